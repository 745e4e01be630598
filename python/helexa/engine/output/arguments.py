"""The tools of a request: their names, and the JSON types that their schemas declare for arguments.

Models write numbers as texts and texts as numbers; a value of a type that is not declared is converted where that
loses nothing, and stays as it is where it cannot be.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from helexa.engine.output.loose_json import LooseJson, Write, read_whole
from helexa.engine.output.source import Read, Source

JsonTypes = frozenset[str]

_ANY = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
_TEXT = frozenset({"string"})
_MAX_REFERENCES = 16
_TYPE_OF_START = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}
_START_OF_TYPE = {"object": "{", "array": "[", "string": '"'}
_INTEGRAL = re.compile(r"-?[0-9]{1,300}(\.0+)?")


class Tool:
    """One function that the model may call."""

    def __init__(self, name: str, parameters: Mapping[str, Any] | None):
        self.name = name
        self.parameters: Mapping[str, Any] = parameters or {}
        properties = self.parameters.get("properties")
        self.properties: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        self._types: dict[str, JsonTypes] = {}

    @property
    def required(self) -> list[str]:
        required = self.parameters.get("required")
        return [name for name in required if isinstance(name, str)] if isinstance(required, list) else []

    def types(self, key: str) -> JsonTypes | None:
        """The types that the argument `key` may have; None if the schema says nothing of it."""
        if key not in self._types:
            schema = self.properties.get(key, self.parameters.get("additionalProperties"))
            if schema is None or isinstance(schema, bool):
                return None
            self._types[key] = declared_types(schema, self.parameters)
        return self._types[key]

    def member(self, reader: LooseJson, source: Source, key: str, write: Write) -> Read[None]:
        """Reads the value of the argument `key` as JSON and writes it in a declared type."""
        types = self.types(key) or _ANY
        source.take((yield from source.whitespace()))
        if (yield from source.char()) in [_START_OF_TYPE[name] for name in types & set(_START_OF_TYPE)]:
            yield from reader.value(write, "{", 1)
            return
        parts: list[str] = []
        yield from reader.value(parts.append, "{", 1)
        value = "".join(parts)
        if value and not source.is_cut_off:
            write(as_declared(value, types))


class Tools:
    """The tools of a request by name."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]):
        """tools: as in OpenAI's chat API; those that are no functions are left out."""
        functions = [tool.get("function") for tool in tools]
        self._tools = {
            function["name"]: Tool(function["name"], function.get("parameters"))
            for function in functions
            if isinstance(function, Mapping) and isinstance(function.get("name"), str)
        }
        self._by_plain_name: dict[str, str | None] = {}
        for name in self._tools:
            plain = _plain(name)
            self._by_plain_name[plain] = None if plain in self._by_plain_name else name
        self.longest_name = max(map(len, self._tools), default=0)

    def __contains__(self, name: str) -> bool:
        return name in self._tools

    def __iter__(self) -> Any:
        return iter(self._tools.values())

    def find(self, written: str) -> Tool:
        """The tool that a model means by `written`; one without a schema if there is none."""
        name = written.strip().strip("\"'`").strip()
        found = name if name in self._tools else self._by_plain_name.get(_plain(name))
        return self._tools[found] if found else Tool(name, None)

    def accepting(self, keys: Sequence[str]) -> Tool | None:
        """The only tool whose schema has all of `keys`, and whose required ones are among them."""
        fitting = [
            tool
            for tool in self._tools.values()
            if keys and set(keys) <= set(tool.properties) and set(tool.required) <= set(keys)
        ]
        return fitting[0] if len(fitting) == 1 else None


def declared_types(schema: Any, root: Mapping[str, Any], references: int = 0) -> JsonTypes:
    """The JSON types that `schema` admits; all of them where it says nothing. root: what its references refer to."""
    if not isinstance(schema, Mapping) or references > _MAX_REFERENCES:
        return _ANY
    if isinstance(reference := schema.get("$ref"), str):
        return declared_types(_referred(reference, root), root, references + 1)
    named = schema.get("type")
    names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    types = frozenset(name for name in names if isinstance(name, str)) & _ANY
    if not types and (values := _values(schema)) is not None:
        types = frozenset(json_type(json.dumps(value)) for value in values)
    for key in ("anyOf", "oneOf"):
        if not types and isinstance(options := schema.get(key), list):
            types = frozenset().union(*(declared_types(option, root, references + 1) for option in options))
    if not types and isinstance(parts := schema.get("allOf"), list):
        types = _ANY.intersection(*(declared_types(part, root, references + 1) for part in parts))
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
    """The JSON that a text without quotes stands for in one of `types`; a string where it stands for nothing else."""
    value = read_whole(text)
    if value is not None and (types < _ANY or _is_json(text)):
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
    return frozenset({"array"}) if "items" in schema else _ANY


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    node: Any = root
    for part in reference.removeprefix("#").split("/")[1:]:
        node = node.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(node, Mapping) else None
    return node


def _plain(name: str) -> str:
    """A name without what models get wrong: case, separators, and a prefix for the kind of thing that it is."""
    return name.rpartition("functions.")[2].replace("-", "_").replace(".", "_").casefold()
