"""JSON as models write it, made valid while it is read.

What is valid comes out as it is, but for the whitespace between tokens, which becomes that of Python's
json.dumps. Repaired are: single quotes, quotes and line breaks left unescaped within strings, wrong
escapes, halves of surrogate pairs, literals of Python, words without quotes, trailing, doubled and missing
commas, unclosed brackets. Whatever is read, valid JSON is written.
"""

import json
import math
import re
from collections.abc import Callable

from helexa.engine.output.source import WHITESPACE, Read, Source, finished

Write = Callable[[str], None]
Member = Callable[[str, Write], Read[None]]

MAX_DEPTH = 64
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NAMES_NUMBER = re.compile(r"[+-]?0[0-9]|.*_")  # 007 and 1_000 are names rather than numbers
_LITERALS = {
    "true": "true", "True": "true", "TRUE": "true", "false": "false", "False": "false", "FALSE": "false",
    "null": "null", "None": "null", "undefined": "null", "NaN": "null", "": "null",
}  # fmt: skip
_PLAIN = re.compile(r"""[^"'\\\x00-\x1f]+""")
_WORD = re.compile(r"[^\s,:{}\[\]\"'<`]+")
_BARE_KEY = re.compile(r"[\w.$-]+")
_OPENING = {"}": "{", "]": "["}
_SIMPLE_ESCAPES = 'bfnrt"\\/'


class LooseJson:
    """Reads one value after another from a source; outside of strings, any of `ends` closes what is open."""

    def __init__(self, source: Source, ends: tuple[str, ...] = ()):
        self._source = source
        self._ends = ends
        self._open: list[str] = []

    def value(self, write: Write, within: str = "", depth: int = 0) -> Read[None]:
        """Reads a value and writes it as JSON. within: the bracket that it stands in, if any."""
        source = self._source
        yield from source.skip_whitespace()
        first = yield from source.char()
        if first == "{" and depth < MAX_DEPTH:
            yield from self.object(write, depth=depth)
        elif first == "[" and depth < MAX_DEPTH:
            yield from self._array(write, depth)
        elif first and first in "\"'":
            yield from self.string(write, within)
        else:
            yield from self._scalar(write)

    def object(self, write: Write, member: Member | None = None, depth: int = 0) -> Read[None]:
        """Reads an object. member: reads the value for a key, in place of `value`, and writes it.

        Nothing is written for a key until its reader writes.
        """

        def plain(key: str, write: Write) -> Read[None]:
            yield from self.value(write, "{", depth + 1)

        self._begin("{", write)
        separator = ""
        while (yield from self._has_item("}")):
            key = yield from self._key()
            if key is None:
                continue
            before = f"{separator}{json.dumps(key, ensure_ascii=False)}: "
            yield from (member or plain)(key, _after(before, write))
            separator = ", "
        yield from self._close("}", write)

    def string(self, write: Write, within: str) -> Read[None]:
        """Reads a quoted string. within: "{", "[" or, for a key, ":"; what the last quote stands before."""
        source = self._source
        quote = source.take(1)
        write('"')
        while True:
            if run := source.take_run(_PLAIN):
                write(run)
            character = yield from source.char()
            if not character:
                break
            if character == quote and (yield from self._is_closing(within)):
                source.take(1)
                break
            if character == "\\":
                yield from self._escape(write)
            elif character in "\"'" or character < " ":
                write(json.dumps(source.take(1))[1:-1])
        if not source.is_cut_off or character:
            write('"')

    def _array(self, write: Write, depth: int) -> Read[None]:
        self._begin("[", write)
        separator = ""
        while (yield from self._has_item("]")):
            yield from self.value(_after(separator, write), "[", depth + 1)
            separator = ", "
        yield from self._close("]", write)

    def _has_item(self, bracket: str) -> Read[bool]:
        """Whether there is an item before the closing bracket, be it ours or that of an outer one."""
        source = self._source
        while True:
            yield from source.skip_whitespace()
            character = yield from source.char()
            if not character or character == bracket or (yield from self._is_end(0)):
                return False
            if character in "}]" and _OPENING[character] in self._open:
                return False
            if character not in ",:}]":
                return True
            source.take(1)

    def _begin(self, bracket: str, write: Write) -> None:
        self._source.take(1)
        self._open.append(bracket)
        write(bracket)

    def _close(self, bracket: str, write: Write) -> Read[None]:
        self._open.pop()
        if (yield from self._source.char()) == bracket:
            self._source.take(1)
        elif self._source.is_cut_off:
            return
        write(bracket)

    def _key(self) -> Read[str | None]:
        """The key before a colon, and goes past the colon; None for what is no key."""
        source = self._source
        parts: list[str] = []
        if (yield from source.char()) in ('"', "'"):
            yield from self.string(parts.append, ":")
            if source.is_cut_off:
                return None
            key: str = json.loads("".join(parts))
        else:
            while run := source.take_run(_BARE_KEY):
                parts.append(run)
                yield from source.char()
            key = "".join(parts)
            if not key:
                source.take(1)
                return None
        yield from source.skip_whitespace()
        if (yield from source.char()) == ":":
            source.take(1)
        return key

    def _scalar(self, write: Write) -> Read[None]:
        """A number, a literal, or words without quotes."""
        source = self._source
        parts: list[str] = []
        while True:
            parts.append(source.take_run(_WORD))
            character = yield from source.char()
            if not character or character in ",}]\n" or (yield from self._is_end(0)):
                break
            parts.append(source.take(1))
        if not source.is_cut_off:
            write(_scalar("".join(parts).strip(WHITESPACE)))

    def _is_closing(self, within: str) -> Read[bool]:
        """Whether the quote here ends its string: what follows must be able to follow a string."""
        source = self._source
        gap = yield from source.whitespace(1)
        next_one = yield from source.char(1 + gap)
        if not next_one or (yield from self._is_end(1 + gap)):
            return True
        if within == ":":
            return next_one == ":"
        if within == "[":
            return next_one in ",]"
        if within != "{":
            return True
        if next_one == ",":
            return (yield from self._is_key(2 + gap))
        return next_one == "}" or (next_one in "\"'" and (yield from self._has_newline(1, gap)))

    def _is_key(self, ahead: int) -> Read[bool]:
        """Whether a key may stand there, or the end of the object."""
        source = self._source
        ahead += yield from source.whitespace(ahead)
        character = yield from source.char(ahead)
        if not character or character in "\"'}":
            return True
        length = 0
        while character and _BARE_KEY.match(character):
            length += 1
            character = yield from source.char(ahead + length)
        ahead += length
        return length > 0 and (yield from source.char(ahead + (yield from source.whitespace(ahead)))) == ":"

    def _has_newline(self, ahead: int, count: int) -> Read[bool]:
        for offset in range(count):
            if (yield from self._source.char(ahead + offset)) == "\n":
                return True
        return False

    def _is_end(self, ahead: int) -> Read[bool]:
        for end in self._ends:
            if (yield from self._source.starts_with(end, ahead)):
                return True
        return False

    def _escape(self, write: Write) -> Read[None]:
        source = self._source
        character = yield from source.char(1)
        code = (yield from self._code_unit(0)) if character == "u" else None
        if code is not None:
            low = (yield from self._code_unit(6)) if 0xD800 <= code < 0xDC00 else None
            if low is not None and 0xDC00 <= low < 0xE000:
                write(source.take(12))
            else:
                text = source.take(6)
                write("\\ufffd" if 0xD800 <= code < 0xE000 else text)
        elif source.truncated and character in ("", "u") and not (yield from source.char(5)):
            source.take(6)  # an escape that was cut off
        elif character and character in _SIMPLE_ESCAPES:
            write(source.take(2))
        elif character == "'":
            write(source.take(2)[1])
        elif character:
            write("\\" + source.take(1))
        else:
            source.take(1)
            write("\\\\")

    def _code_unit(self, ahead: int) -> Read[int | None]:
        r"""The number in the \uXXXX that stands there, if one does."""
        if not (yield from self._source.starts_with("\\u", ahead)):
            return None
        digits = ""
        for offset in range(2, 6):
            digit = yield from self._source.char(ahead + offset)
            if not digit or digit not in "0123456789abcdefABCDEF":
                return None
            digits += digit
        return int(digits, 16)


def read_whole(text: str) -> str | None:
    """`text` as valid JSON if it is one value and nothing else; None otherwise."""
    source, parts = Source(text, ended=True), list[str]()
    finished(LooseJson(source).value(parts.append))
    rest = finished(source.whitespace())
    return None if finished(source.char(rest)) else "".join(parts)


def _after(before: str, write: Write) -> Write:
    """A `write` that writes `before` first, as soon as there is something to write."""
    rest = [before]

    def write_after(text: str) -> None:
        write(rest.pop() + text if rest else text)

    return write_after


def _scalar(text: str) -> str:
    """A number or a literal as JSON has it, anything else as a string."""
    if text in _LITERALS:
        return _LITERALS[text]
    if _NUMBER.fullmatch(text):
        return text
    try:
        number = math.nan if _NAMES_NUMBER.match(text) else float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        return json.dumps(text, ensure_ascii=False)
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else repr(number)
