"""Request bodies into types: whatever is wrong is an error that names field, value and expectation."""

import difflib
import json
import re
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from helexa.errors import InvalidParameter, MalformedJson, MissingModel

T = TypeVar("T")
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")
_SHOWN = 80  # characters of a wrong value that a message repeats


def decode(body: bytes, kind: type[T]) -> T:
    """`body` as a `kind`. Raises MalformedJson, MissingModel or InvalidParameter."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        wrong = error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return decode(_repaired(body, error), kind)
    try:
        whole = msgspec.json.decode(body)  # what comes after the wrong value may be no JSON at all
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return decode(_repaired(body, error), kind)
    raise _describe(wrong, whole, kind)


def _repaired(body: bytes, error: Exception) -> bytes:
    """`body` without what made it no JSON. Raises MalformedJson."""
    repaired = _without_lone_surrogates(body)
    if repaired is None:
        raise MalformedJson(f"the body is not JSON: {error}") from None
    return repaired


def _without_lone_surrogates(body: bytes) -> bytes | None:
    """`body` with U+FFFD for each half character, as JavaScript clients that cut a text send; or None."""
    if b"\\u" not in body:
        return None
    try:
        text = json.dumps(json.loads(body), ensure_ascii=False)
    except (ValueError, RecursionError):
        return None
    repaired = re.sub("[\ud800-\udfff]", "\ufffd", text)
    return repaired.encode() if repaired != text else None


def _describe(error: msgspec.ValidationError, body: Any, kind: type) -> InvalidParameter | MissingModel:
    text, _, path = str(error).partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    name = re.search(r"`([^`]*)`$", text)
    if name and text.startswith("Object missing required field"):
        param = f"{path}.{name[1]}".lstrip(".")
        if param == "model":
            return MissingModel("the request names no model; set the field 'model'", param=param)
        return InvalidParameter(f"missing required field '{param}'", param=param)
    if name and text.startswith("Object contains unknown field"):
        param = f"{path}.{name[1]}".lstrip(".")
        hint = _nearest(name[1], kind) if not path else ""
        return InvalidParameter(f"unknown field '{param}'{hint}", param=param)
    expectation = _one_of(_options(kind, path)) if text.startswith("Invalid enum value") else _readable(text)
    if not path:
        return InvalidParameter(f"the body is wrong: {expectation}")
    param = path.replace("[...]", "")
    return InvalidParameter(f"'{param}' is {_shown(body, path)}; {expectation}", param=param)


def _nearest(name: str, kind: type) -> str:
    known = getattr(kind, "__struct_fields__", ())
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _options(kind: type, path: str) -> list[Any]:
    """The values that may stand at msgspec's `path`."""
    found = _alternatives(inspect.type_info(kind))
    for name, index in _STEP.findall("." + path if path[:1] != "[" else path):
        inner: list[inspect.Type] = []
        for one in found:
            if isinstance(one, inspect.StructType):
                inner += (field.type for field in one.fields if field.encode_name == name)
            elif isinstance(one, inspect.ListType) and index:
                inner.append(one.item_type)
            elif isinstance(one, inspect.DictType) and index:
                inner.append(one.value_type)
        found = [alternative for one in inner for alternative in _alternatives(one)]
    return [value for one in found if isinstance(one, inspect.LiteralType) for value in one.values]


def _alternatives(one: inspect.Type) -> list[inspect.Type]:
    return list(one.types) if isinstance(one, inspect.UnionType) else [one]


def _one_of(values: list[Any]) -> str:
    *others, last = [msgspec.json.encode(value).decode() for value in values] or ["another value"]
    return f"expected {', '.join(others)} or {last}" if others else f"expected {last}"


def _readable(text: str) -> str:
    """'Expected `int | null`, got `str`' as 'expected an integer or null, got a string', in JSON's words."""
    words = {"int": "integer", "float": "number", "str": "string", "bool": "boolean"}
    text = re.sub(r"\b(int|float|str|bool)\b", lambda match: words[match[1]], text)
    text = text.replace(" | ", " or ").replace("`", "")
    return text[:1].lower() + text[1:]


def _shown(value: Any, path: str) -> str:
    """What `value` has at msgspec's `path`, as JSON, cut short."""
    for name, index in _STEP.findall("." + path if path[0] != "[" else path):
        if index == "...":
            break
        value = value[int(index)] if index else value.get(name)
    shown = msgspec.json.encode(value).decode()
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + "…"
