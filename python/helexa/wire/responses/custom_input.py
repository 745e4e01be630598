"""The text that a custom tool gets, out of the JSON arguments that a model calls it with, as they come.

Models call functions with JSON; a custom tool takes plain text. It is offered as a function with the one
parameter `input`, whose value is decoded here piece by piece.
"""

import json
import re

PARAMETER = "input"
_HEAD = re.compile(r'\s*\{\s*"' + PARAMETER + r'"\s*:\s*"')
# What can be decoded without knowing what follows: an escape cut short cannot, nor the first half of a pair.
_HEX = "[0-9a-fA-F]"
_HALF = rf"\\u[dD][89abAB]{_HEX}{{2}}"
_PAIR = rf"{_HALF}\\u[dD][c-fC-F]{_HEX}{{2}}"
_ALONE = rf"{_HALF}(?=[^\\]|\\[^u]|\\u[^dD]|\\u[dD][^c-fC-F])"
_SINGLE = rf"\\u(?![dD][89abAB]){_HEX}{{4}}"
_NO_ESCAPE = rf"\\u(?={_HEX}{{0,3}}[^0-9a-fA-F])"
_TEXT = re.compile(rf'(?:[^"\\]+|\\[^u]|{_PAIR}|{_ALONE}|{_SINGLE}|{_NO_ESCAPE})*')
_ESCAPE = re.compile(rf"\\u({_HEX}{{4}})|\\(.)", re.DOTALL)
_MEANT = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class CustomInput:
    """`feed` yields the text so far unseen; `finish` what only the whole arguments can tell."""

    def __init__(self) -> None:
        self._pending = ""
        self._is_inside = False
        self._is_complete = False

    def feed(self, fragment: str) -> str:
        """The text that `fragment` adds."""
        if self._is_complete:
            return ""
        self._pending += fragment
        if not self._is_inside:
            head = _HEAD.match(self._pending)
            if head is None:
                return ""
            self._pending = self._pending[head.end() :]
            self._is_inside = True
        found = _TEXT.match(self._pending)
        assert found is not None  # it may be empty
        self._pending = self._pending[found.end() :]
        self._is_complete = self._pending.startswith('"')
        return _decoded(found[0])

    def finish(self) -> str:
        """The rest of the text: all of it for arguments of another shape than the one asked for."""
        if self._is_inside or not self._pending:
            return ""
        try:
            arguments = json.loads(self._pending, strict=False)
        except ValueError:
            return self._pending
        texts = list(arguments.values()) if isinstance(arguments, dict) else [arguments]
        if isinstance(arguments, dict) and isinstance(arguments.get(PARAMETER), str):
            texts = [arguments[PARAMETER]]
        return texts[0] if len(texts) == 1 and isinstance(texts[0], str) else self._pending


def arguments_of(text: str) -> str:
    """The arguments of a call that gave a custom tool this text."""
    return json.dumps({PARAMETER: text}, ensure_ascii=False)


def _decoded(text: str) -> str:
    """The text of a JSON string; a backslash before what it cannot escape is one, half a pair U+FFFD."""

    def meant(escape: re.Match[str]) -> str:
        return chr(int(escape[1], 16)) if escape[1] else _MEANT.get(escape[2], escape[0])

    decoded = _ESCAPE.sub(meant, text)
    return decoded.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
