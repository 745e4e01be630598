"""The parameters of a call in the XML of Qwen3-Coder and Qwen3.5, as the JSON object that they stand for.

The values are text without any escapes, so where one ends is decided by what follows: a value may be a
document that has such tags itself.
"""

import json
import re

from helexa.engine.output.arguments import silent
from helexa.engine.output.json_types import TEXT, from_text
from helexa.engine.output.loose_json import Write
from helexa.engine.output.source import Read, Source
from helexa.engine.output.tags import (
    CLOSE,
    FUNCTION,
    FUNCTION_END,
    OPEN,
    PARAMETER,
    PARAMETER_END,
    skip_tag,
    tag_name,
)
from helexa.engine.output.tools import Tool

_VALUE = re.compile(r"[^<\n]+")


class XmlParameters:
    """Reads the parameters of one call."""

    def __init__(self, source: Source, tool: Tool):
        self._source = source
        self._tool = tool
        self._seen: set[str] = set()

    def read(self, write: Write) -> Read[None]:
        """Reads parameters to the end of their function and writes them as one JSON object."""
        source, seen = self._source, self._seen
        write("{")
        while True:
            yield from source.skip_whitespace()
            character = yield from source.char()
            if character == "<" and (yield from self._is_function_over()):
                break
            if (yield from source.starts_with(PARAMETER)):
                tag = yield from tag_name(source, PARAMETER)
                if tag is not None:
                    key, length = tag
                    source.take(length)
                    before = f"{', ' if seen else ''}{json.dumps(key, ensure_ascii=False)}: "
                    target = silent if key in seen else write
                    seen.add(key)
                    yield from self._parameter(key, before, target)
                    continue
            if not character:
                break
            source.take(1)
        if not source.is_cut_off:
            write("}")

    def _is_function_over(self) -> Read[bool]:
        """Goes past `</function>`; whether the function ends here, with or without it."""
        source = self._source
        if (yield from source.starts_with(FUNCTION_END)):
            yield from skip_tag(source)
            return True
        for tag in (CLOSE, OPEN, FUNCTION):
            if (yield from source.starts_with(tag)):
                return True
        return False

    def _parameter(self, key: str, before: str, write: Write) -> Read[None]:
        """Reads the text up to the end of a parameter; what is surely a string is written as it comes."""
        source = self._source
        types = self._tool.types(key) or TEXT
        if (yield from source.char()) == "\n":
            source.take(1)
        parts: list[str] = []
        is_text = types == TEXT
        if types == {"string", "null"}:
            is_text = not ((yield from source.starts_with("null")) or (yield from source.starts_with("None")))
        if is_text:
            write(before + '"')
            yield from self._text(lambda text: write(_escaped(text)))
            if not source.is_cut_off:
                write('"')
            return
        yield from self._text(parts.append)
        if not source.is_cut_off:
            write(before + from_text("".join(parts), types))

    def _text(self, write: Write) -> Read[None]:
        """Reads to the end of a parameter and past its tag, without the line break before it."""
        source = self._source
        while True:
            if run := source.take_run(_VALUE):
                write(run)
            character = yield from source.char()
            if not character:
                return
            gap = int(character == "\n")
            if (yield from source.char(gap)) in ("<", ""):
                length = yield from self._end(gap)
                if length is not None:
                    source.take(gap + length)
                    return
            if character in "<\n":
                write(source.take(1))

    def _end(self, ahead: int) -> Read[int | None]:
        """How long the tag is that ends the parameter there: 0 where it is missing; None if the text goes on.

        A value may itself contain such tags, so one counts only if what follows it fits.
        """
        source = self._source
        if (rest := (yield from source.ends_within(PARAMETER_END, ahead))) is not None:
            return rest
        if (yield from source.starts_with(PARAMETER_END, ahead)):
            behind = ahead + len(PARAMETER_END)
            behind += yield from source.whitespace(behind)
            follows = yield from self._may_follow(behind)
            return len(PARAMETER_END) if follows else None
        if (yield from source.starts_with(PARAMETER, ahead)):
            tag = yield from tag_name(source, PARAMETER, ahead)
            is_next = tag is not None and tag[0] in self._tool.properties and tag[0] not in self._seen
            return 0 if is_next else None
        if (yield from source.starts_with(FUNCTION_END + ">", ahead)):
            behind = ahead + len(FUNCTION_END) + 1
            behind += yield from source.whitespace(behind)
            return 0 if (yield from source.starts_with_any((CLOSE, OPEN, ""), behind)) else None
        if (yield from source.starts_with(CLOSE, ahead)):
            behind = ahead + len(CLOSE)
            behind += yield from source.whitespace(behind)
            return 0 if (yield from source.starts_with_any((OPEN, ""), behind)) else None
        return None

    def _may_follow(self, ahead: int) -> Read[bool]:
        """Whether what stands there, or begins there where the text ends, may follow a parameter."""
        for tag in (PARAMETER, FUNCTION_END, CLOSE, OPEN, PARAMETER_END):
            if (yield from self._source.starts_with(tag, ahead)):
                return True
            if (yield from self._source.ends_within(tag, ahead)) is not None:
                return True
        return False


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
