"""JSON types: those that a schema admits, and values brought into one of them.

Models write numbers as texts and texts as numbers. A value of a type that is not declared is converted
where that loses nothing, and stays as it is where it would.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from helexa.engine.output.loose_json import read_whole

JsonTypes = frozenset[str]

ANY = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
TEXT = frozenset({"string"})

_MAX_REFERENCES = 16
_TYPE_OF_START = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}
_INTEGRAL = re.compile(r"-?[0-9]{1,300}(\.0+)?")


def declared_types(schema: Any, root: Mapping[str, Any], references: int = 0) -> JsonTypes:
    """The JSON types that `schema` admits; all where it says nothing. root: what references refer to."""
    if not isinstance(schema, Mapping) or references > _MAX_REFERENCES:
        return ANY
    if isinstance(reference := schema.get("$ref"), str):
        return declared_types(_referred(reference, root), root, references + 1)
    named = schema.get("type")
    names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    types = frozenset(name for name in names if isinstance(name, str)) & ANY
    if not types and (values := _values(schema)) is not None:
        types = frozenset(json_type(json.dumps(value)) for value in values)
    for key in ("anyOf", "oneOf"):
        if not types and isinstance(options := schema.get(key), list):
            types = frozenset().union(*(declared_types(option, root, references + 1) for option in options))
    if not types and isinstance(parts := schema.get("allOf"), list):
        types = ANY.intersection(*(declared_types(part, root, references + 1) for part in parts))
    if not types:
        types = _implied(schema)
    return types | {"null"} if schema.get("nullable") is True else types


def as_declared(value: str, types: JsonTypes) -> str:
    """`value`, which is JSON, in one of `types`; unchanged if it cannot be converted without loss."""
    kind = json_type(value)
    if kind in types or (kind == "integer" and "number" in types):
        return value
    if kind == "number" and "integer" in types and _INTEGRAL.fullmatch(value):
        return value.partition(".")[0]
    if kind == "string":
        return from_text(json.loads(value), types)
    if "string" in types and kind != "null":
        return json.dumps(value, ensure_ascii=False)
    return value


def from_text(text: str, types: JsonTypes) -> str:
    """The JSON that a text without quotes stands for in one of `types`; a string if for nothing else."""
    value = read_whole(text)
    if value is not None and (types < ANY or _is_json(text)):
        kind = json_type(value)
        if kind == "number" and "number" not in types and _INTEGRAL.fullmatch(value):
            kind, value = "integer", value.partition(".")[0]
        if kind != "string" and (kind in types or (kind == "integer" and "number" in types)):
            return value
    return json.dumps(text, ensure_ascii=False)


def json_type(value: str) -> str:
    """The name of the type of a JSON text; an integer is one only if it is written so."""
    start = value[:1]
    return _TYPE_OF_START.get(start) or ("number" if set(value) & set(".eE") else "integer")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    enum = schema.get("enum")
    return enum if isinstance(enum, list) and enum else None


def _implied(schema: Mapping[str, Any]) -> JsonTypes:
    if "properties" in schema or "additionalProperties" in schema:
        return frozenset({"object"})
    return frozenset({"array"}) if "items" in schema else ANY


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    node: Any = root
    for part in reference.removeprefix("#").split("/")[1:]:
        node = node.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(node, Mapping) else None
    return node
