"""The tags of tool calls, and reading them as loosely as models write them."""

from helexa.engine.output.source import WHITESPACE, Read, Source

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function", "</function"
PARAMETER, PARAMETER_END = "<parameter", "</parameter>"
FENCE = "```"

THINKING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
)
MARKERS = (OPEN, CLOSE, *(marker for pair in THINKING for marker in pair))  # what parsers must get to see

JSON_ENDS = (CLOSE, OPEN, FUNCTION_END)  # what ends JSON that is not closed

_MAX_NAME = 256


def tag_name(source: Source, tag: str, ahead: int = 0) -> Read[tuple[str, int] | None]:
    """The name in `<tag=name>` or `<tag name="name">`, and the length of the whole; None if it is neither."""
    length = len(tag)
    gap = yield from source.whitespace(ahead + length)
    if gap and (yield from source.starts_with("name", ahead + length + gap)):
        length += gap + len("name")
        gap = yield from source.whitespace(ahead + length)
    length += gap
    if (yield from source.char(ahead + length)) != "=":
        return None
    length += 1
    name = ""
    while len(name) < _MAX_NAME:
        character = yield from source.char(ahead + length)
        length += 1
        if character == ">":
            name = name.strip(WHITESPACE).strip("\"'").strip(WHITESPACE)
            return (name, length) if name else None
        if character == "\n" and (line := name.strip(WHITESPACE)):  # the bracket was left out
            return line, length - 1
        if not character or character == "<":
            return None
        name += character
    return None


def skip_tag(source: Source) -> Read[None]:
    """Goes past the rest of a tag, or of its line."""
    while (character := (yield from source.char())) and character not in ">\n":
        source.take(1)
    if character == ">":
        source.take(1)
