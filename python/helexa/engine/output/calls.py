"""Reading tool calls: Hermes' JSON, the XML of Qwen3-Coder and Qwen3.5, and what models make of the two.

A call is announced as soon as its name is sure, and its arguments follow while they are read. Until then
nothing is written, so that text which turns out to be no call can still come out as text.
"""

import json
import re
from collections.abc import Callable

from helexa.engine.output.arguments import read_arguments, whole_arguments
from helexa.engine.output.events import Event, ToolArguments, ToolStart
from helexa.engine.output.json_call import ARGUMENT_KEYS, JsonCall, call_of
from helexa.engine.output.loose_json import LooseJson, Write
from helexa.engine.output.source import WHITESPACE, Read, Source
from helexa.engine.output.tags import (
    CLOSE,
    FENCE,
    FUNCTION,
    FUNCTION_END,
    JSON_ENDS,
    OPEN,
    PARAMETER,
    skip_tag,
    tag_name,
)  # fmt: skip
from helexa.engine.output.tools import Tool, Tools
from helexa.engine.output.xml_parameters import XmlParameters

_NAME = re.compile(r"[\w.:/$-]+")

Emit = Callable[[Event], None]


class Calls:
    """Reads the calls of one answer and numbers them."""

    def __init__(self, source: Source, tools: Tools, emit: Emit):
        self._source = source
        self._tools = tools
        self._emit = emit
        self.count = 0  # of the calls that have been announced

    def wrapped(self) -> Read[bool]:
        """Reads `<tool_call>` and what belongs to it; False, with nothing written, if that is no call."""
        source, before = self._source, self.count
        while (yield from source.starts_with(OPEN)):
            source.take(len(OPEN))
            yield from self._source.skip_whitespace()
        is_fenced = yield from self._skip_fence()
        while True:
            mark = source.mark()
            if not (yield from self._body()):
                source.rewind(mark)
                break
            source.release(mark)
            if (yield from self._skip_leftovers(is_fenced)) or not (
                yield from self._source.starts_with_any(("{", FUNCTION), 0)
            ):
                break
        return self.count > before

    def bare(self, *, must_close: bool = False) -> Read[bool]:
        """Reads a call without `<tool_call>`: `<function=…>`, or an object, which may be in a code fence.

        False if it ends before it has become a call, with nothing written, or if it must close and does not.
        """
        is_fenced = yield from self._skip_fence()
        is_call = yield from self._body()
        is_closed = yield from self._skip_leftovers(is_fenced)
        return is_call and (is_closed or not must_close)

    def is_bare_function(self, ahead: int = 0) -> Read[bool]:
        """Whether `<function=…>` with the name of a tool stands there."""
        if not (yield from self._source.starts_with(FUNCTION, ahead)):
            return False
        tag = yield from tag_name(self._source, FUNCTION, ahead)
        return tag is not None and self._tools.find(tag[0]).name in self._tools

    def is_bare_object(self, ahead: int = 0) -> Read[bool]:
        """Whether an object stands there that begins with the name of a tool, or a code fence with one."""
        source = self._source
        if (yield from source.starts_with(FENCE, ahead)):
            ahead += len(FENCE)
            while (character := (yield from source.char(ahead))).isalpha():
                ahead += 1
            if character not in WHITESPACE:
                return False
            ahead += yield from source.whitespace(ahead)
        if (yield from source.char(ahead)) != "{":
            return False
        ahead += 1
        for expected in ('"name"', ":", '"'):
            ahead += yield from source.whitespace(ahead)
            if not (yield from source.starts_with(expected, ahead)):
                return False
            ahead += len(expected)
        name = ""
        while len(name) <= self._tools.longest_name and (character := (yield from source.char(ahead))) != '"':
            if not character:
                return False
            name += character
            ahead += 1
        if name not in self._tools:
            return False
        ahead += 1 + (yield from source.whitespace(ahead + 1))
        if (yield from source.char(ahead)) != ",":
            return False
        ahead += 1 + (yield from source.whitespace(ahead + 1))
        return (yield from source.starts_with_any(tuple(f'"{key}"' for key in ARGUMENT_KEYS), ahead))

    # The forms of a call

    def _body(self) -> Read[bool]:
        source = self._source
        character = yield from source.char()
        if character == "{":
            return (yield from JsonCall(source, self._tools, self._start).read())
        if character == "[":
            return (yield from self._list())
        if (yield from source.starts_with(FUNCTION)):
            return (yield from self._function())
        if (yield from source.starts_with(PARAMETER)):
            return (yield from self._nameless())
        return (yield from self._named_object())

    def _list(self) -> Read[bool]:
        """A list of calls; read whole, for there is nothing to tell it from other lists before its end."""
        parts: list[str] = []
        yield from LooseJson(self._source, JSON_ENDS).value(parts.append)
        if self._source.is_cut_off:
            return False
        items = json.loads("".join(parts))
        calls = [call_of(item, self._tools) if isinstance(item, dict) else None for item in items]
        if None in calls:
            return False
        for tool, arguments in filter(None, calls):
            self._start(tool)(arguments)
        return bool(calls)

    def _function(self) -> Read[bool]:
        tag = yield from tag_name(self._source, FUNCTION)
        if tag is None:
            return False
        name, length = tag
        self._source.take(length)
        tool = self._tools.find(name)
        write = self._start(tool)
        yield from self._source.skip_whitespace()
        if (yield from self._source.char()) == "{":
            yield from read_arguments(self._source, tool, write)
        else:
            yield from XmlParameters(self._source, tool).read(write)
        return True

    def _nameless(self) -> Read[bool]:
        """Parameters without a function, where only one tool takes all of them."""
        parts: list[str] = []
        yield from XmlParameters(self._source, Tool("", None)).read(parts.append)
        if self._source.is_cut_off:
            return False
        text = "".join(parts)
        tool = self._tools.accepting(list(json.loads(text)))
        if tool is None:
            return False
        self._start(tool)(whole_arguments(tool, text))
        return True

    def _named_object(self) -> Read[bool]:
        """The name of a tool, and its arguments as an object."""
        source, name = self._source, ""
        while len(name) <= self._tools.longest_name and (run := (yield from self._name_character(len(name)))):
            name += run
        gap = yield from source.whitespace(len(name))
        if not name or self._tools.find(name).name not in self._tools:
            return False
        if (yield from source.char(len(name) + gap)) != "{":
            return False
        source.take(len(name) + gap)
        tool = self._tools.find(name)
        yield from read_arguments(source, tool, self._start(tool))
        return True

    def _start(self, tool: Tool) -> Write:
        """Announces a call; what the returned function is given are its arguments."""
        index = self.count
        self.count += 1
        self._emit(ToolStart(index, tool.name))
        return lambda fragment: self._emit(ToolArguments(index, fragment)) if fragment else None

    # Small things

    def _name_character(self, ahead: int) -> Read[str]:
        character = yield from self._source.char(ahead)
        return character if character and _NAME.match(character) else ""

    def _skip_fence(self) -> Read[bool]:
        """Goes past the opening line of a code fence, if there is one."""
        source = self._source
        if not (yield from source.starts_with(FENCE)):
            return False
        source.take(len(FENCE))
        while (character := (yield from source.char())) and character.isalpha():
            source.take(1)
        yield from source.skip_whitespace()
        return True

    def _skip_leftovers(self, is_fenced: bool) -> Read[bool]:
        """Goes past what may be left of a call (tags, brackets, the end of its fence); True after its end."""
        source = self._source
        while True:
            yield from source.skip_whitespace()
            rest = yield from source.ends_within(CLOSE)
            if rest is not None:
                source.take(rest)
                return False
            if (yield from source.starts_with(CLOSE)):
                source.take(len(CLOSE))
                return True
            if is_fenced and (yield from source.starts_with(FENCE)):
                source.take(len(FENCE))
            elif (yield from source.starts_with_any((FUNCTION_END, "</parameter"))):
                yield from skip_tag(source)
            elif (yield from source.char()) in ("}", "]", ","):
                source.take(1)
            else:
                return False
