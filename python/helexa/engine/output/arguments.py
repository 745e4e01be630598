"""The arguments of one call, read as a JSON object and written with the types that the tool declares."""

import json

from helexa.engine.output.json_types import ANY, as_declared
from helexa.engine.output.loose_json import LooseJson, Write, read_whole
from helexa.engine.output.source import Read, Source, finished
from helexa.engine.output.tags import JSON_ENDS
from helexa.engine.output.tools import Tool

_START_OF_TYPE = {"object": "{", "array": "[", "string": '"'}


def read_arguments(source: Source, tool: Tool, write: Write) -> Read[None]:
    """Reads an object and writes it; of a key that comes twice, the first counts."""
    reader, seen = LooseJson(source, JSON_ENDS), set[str]()

    def member(key: str, write: Write) -> Read[None]:
        yield from _value(reader, source, tool, key, silent if key in seen else write)
        seen.add(key)

    yield from reader.object(write, member)


def whole_arguments(tool: Tool, text: str) -> str:
    """The object that a text stands for: itself, one that it encodes, or one with it as its only value."""
    value = read_whole(text)
    for _ in range(2):  # models encode the object as a text, and the text once more
        decoded = json.loads(value) if value else None
        if isinstance(decoded, str):
            value = read_whole(decoded)
    if value is None or value in ("null", '""'):
        return "{}" if value else json.dumps({_sole_key(tool): text}, ensure_ascii=False)
    if not value.startswith("{"):
        return f"{{{json.dumps(_sole_key(tool))}: {value}}}"
    parts: list[str] = []
    finished(read_arguments(Source(value, ended=True), tool, parts.append))
    return "".join(parts)


def silent(text: str) -> None:
    """Writes nothing."""


def _value(reader: LooseJson, source: Source, tool: Tool, key: str, write: Write) -> Read[None]:
    """Reads a value and writes it in a declared type, at once if its beginning shows that it has one."""
    types = tool.types(key) or ANY
    yield from source.skip_whitespace()
    if (yield from source.char()) in [_START_OF_TYPE[name] for name in types & set(_START_OF_TYPE)]:
        yield from reader.value(write, "{", 1)
        return
    parts: list[str] = []
    yield from reader.value(parts.append, "{", 1)
    if parts and not source.is_cut_off:
        write(as_declared("".join(parts), types))


def _sole_key(tool: Tool) -> str:
    """The name for an argument that came without one."""
    return next(iter(tool.properties)) if len(tool.properties) == 1 else "arguments"
