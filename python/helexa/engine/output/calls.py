"""Reading tool calls: Hermes' JSON, the XML of Qwen3-Coder and Qwen3.5, and what models make of the two.

A call is announced as soon as its name is sure, and its arguments follow while they are read. Until then nothing is
written, so that text which turns out to be no call can still come out as text.
"""

import json
import re
from collections.abc import Callable

from helexa.engine.output.arguments import Tool, Tools, from_text
from helexa.engine.output.events import Event, ToolArguments, ToolStart
from helexa.engine.output.loose_json import LooseJson, Write, read_whole
from helexa.engine.output.source import WHITESPACE, Read, Source, finished

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function", "</function"
PARAMETER, PARAMETER_END = "<parameter", "</parameter>"
FENCE = "```"

_ENDS = (CLOSE, OPEN, FUNCTION_END)
_NAME_KEYS = ("name", "function_name", "tool_name", "tool", "function")
_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
_MAX_NAME = 256
_VALUE = re.compile(r"[^<\r\n]+")
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
            yield from self._skip_whitespace()
        yield from self._skip_fence()
        while True:
            mark = source.mark()
            if not (yield from self._body()):
                source.rewind(mark)
                break
            source.release(mark)
            if (yield from self._skip_leftovers()) or not (yield from self._any_of(("{", FUNCTION), 0)):
                break
        return self.count > before

    def bare(self) -> Read[bool]:
        """Reads a call without `<tool_call>`: `<function=…>`, or an object, which may be in a code fence.

        True if it was closed as if it had been opened; it is written in any case.
        """
        yield from self._skip_fence()
        yield from self._body()
        return (yield from self._skip_leftovers())

    def is_bare_function(self, ahead: int = 0) -> Read[bool]:
        """Whether `<function=…>` with the name of a tool stands there."""
        if not (yield from self._source.starts_with(FUNCTION, ahead)):
            return False
        tag = yield from self._tag_name(FUNCTION, ahead)
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
        return name in self._tools

    # The forms of a call

    def _body(self) -> Read[bool]:
        source = self._source
        character = yield from source.char()
        if character == "{":
            return (yield from _ObjectCall(self, source, self._tools).read())
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
        yield from LooseJson(self._source, _ENDS).value(parts.append)
        if self._source.is_cut_off:
            return False
        calls = [self._call_of(item) for item in json.loads("".join(parts)) or [None]]
        for call in calls:
            if call is None:
                return False
        for call in calls:
            if call is not None:
                self.write_call(*call)
        return True

    def _call_of(self, item: object) -> tuple[Tool, str] | None:
        if not isinstance(item, dict):
            return None
        inner = item.get("function")
        item = inner if isinstance(inner, dict) else item
        name = next((item[key] for key in _NAME_KEYS if isinstance(item.get(key), str)), None)
        arguments: object = next((item[key] for key in _ARGUMENT_KEYS if key in item), {})
        if name is None:
            return None
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return self._tools.find(name), text

    def _function(self) -> Read[bool]:
        tag = yield from self._tag_name(FUNCTION, 0)
        if tag is None:
            return False
        name, length = tag
        self._source.take(length)
        tool = self._tools.find(name)
        write = self.start(tool)
        yield from self._skip_whitespace()
        if (yield from self._source.char()) == "{":
            yield from self.arguments(tool, write)
        else:
            yield from self._parameters(tool, write)
        return True

    def _nameless(self) -> Read[bool]:
        """Parameters without a function, where only one tool takes all of them."""
        parts: list[str] = []
        yield from self._parameters(Tool("", None), parts.append)
        if self._source.is_cut_off:
            return False
        text = "".join(parts)
        tool = self._tools.accepting(list(json.loads(text)))
        if tool is None:
            return False
        self.write_call(tool, text)
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
        yield from self.arguments(tool, self.start(tool))
        return True

    # Arguments

    def start(self, tool: Tool) -> Write:
        """Announces a call; what the returned function is given are its arguments."""
        index = self.count
        self.count += 1
        self._emit(ToolStart(index, tool.name))
        return lambda fragment: self._emit(ToolArguments(index, fragment)) if fragment else None

    def arguments(self, tool: Tool, write: Write) -> Read[None]:
        """Reads an object with the arguments."""
        source = self._source
        reader, seen = LooseJson(source, _ENDS), set[str]()

        def member(key: str, write: Write) -> Read[None]:
            yield from tool.member(reader, source, key, (lambda text: None) if key in seen else write)
            seen.add(key)

        yield from reader.object(write, member)

    def write_call(self, tool: Tool, arguments: str) -> None:
        """Writes a whole call. arguments: JSON, be it an object, a text that contains one, or anything else."""
        self.start(tool)(self.whole_arguments(tool, arguments))

    def whole_arguments(self, tool: Tool, text: str) -> str:
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
        finished(Calls(Source(value, ended=True), self._tools, self._emit).arguments(tool, parts.append))
        return "".join(parts)

    def _parameters(self, tool: Tool, write: Write) -> Read[None]:
        source, seen = self._source, set[str]()
        write("{")
        while True:
            yield from self._skip_whitespace()
            character = yield from source.char()
            if character == "<" and (yield from self._is_function_over()):
                break
            if (yield from source.starts_with(PARAMETER)):
                tag = yield from self._tag_name(PARAMETER, 0)
                if tag is not None:
                    key, length = tag
                    source.take(length)
                    before = f"{', ' if seen else ''}{json.dumps(key, ensure_ascii=False)}: "
                    target = (lambda text: None) if key in seen else write
                    seen.add(key)
                    yield from self._parameter(tool, key, before, target, seen)
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
            yield from self._skip_tag()
            return True
        for tag in (CLOSE, OPEN, FUNCTION):
            if (yield from source.starts_with(tag)):
                return True
        return False

    def _parameter(self, tool: Tool, key: str, before: str, write: Write, seen: set[str]) -> Read[None]:
        """Reads the text up to the end of a parameter; what is surely a string is written as it comes."""
        source = self._source
        types = tool.types(key) or frozenset({"string"})
        for line_end in ("\r\n", "\n"):
            if (yield from source.starts_with(line_end)):
                source.take(len(line_end))
                break
        parts: list[str] = []
        is_text = types == {"string"}
        if types == {"string", "null"}:
            is_text = not ((yield from source.starts_with("null")) or (yield from source.starts_with("None")))
        if is_text:
            write(before + '"')
            yield from self._text(lambda text: write(_escaped(text)), tool, seen)
            if not source.is_cut_off:
                write('"')
            return
        yield from self._text(parts.append, tool, seen)
        if not source.is_cut_off:
            write(before + from_text("".join(parts), types))

    def _text(self, write: Write, tool: Tool, seen: set[str]) -> Read[None]:
        """Reads to the end of a parameter and past its tag, without the line break before it."""
        source = self._source
        while True:
            if run := source.take_run(_VALUE):
                write(run)
            character = yield from source.char()
            if not character:
                return
            gap = 0
            for line_end in ("\r\n", "\n"):
                if (yield from source.starts_with(line_end)):
                    gap = len(line_end)
                    break
            if (yield from source.char(gap)) in ("<", ""):
                length = yield from self._parameter_end(gap, tool, seen)
                if length is not None and not (source.truncated and not (yield from source.char(gap))):
                    source.take(gap + length)
                    return
            if character == "<" or gap:
                write(source.take(gap or 1))
            elif character == "\r":
                write(source.take(1))

    def _parameter_end(self, ahead: int, tool: Tool, seen: set[str]) -> Read[int | None]:
        """How long the tag is that ends the parameter there: 0 where it is missing; None if the text goes on.

        A value may itself contain such tags, so one counts only if what follows it fits.
        """
        source = self._source
        if not (yield from source.char(ahead)):
            return 0
        if (yield from source.starts_with(PARAMETER_END, ahead)):
            behind = ahead + len(PARAMETER_END)
            behind += yield from source.whitespace(behind)
            follows = yield from self._any_of(
                (PARAMETER, FUNCTION_END, CLOSE, OPEN, PARAMETER_END, ""), behind
            )
            return len(PARAMETER_END) if follows else None
        if (yield from source.starts_with(PARAMETER, ahead)):
            tag = yield from self._tag_name(PARAMETER, ahead)
            is_next = tag is not None and tag[0] in tool.properties and tag[0] not in seen
            return 0 if is_next else None
        if (yield from source.starts_with(FUNCTION_END + ">", ahead)):
            behind = ahead + len(FUNCTION_END) + 1
            behind += yield from source.whitespace(behind)
            return 0 if (yield from self._any_of((CLOSE, OPEN, ""), behind)) else None
        if (yield from source.starts_with(CLOSE, ahead)):
            behind = ahead + len(CLOSE)
            behind += yield from source.whitespace(behind)
            return 0 if (yield from self._any_of((OPEN, ""), behind)) else None
        return None

    # Small things

    def _any_of(self, literals: tuple[str, ...], ahead: int) -> Read[bool]:
        """Whether one of `literals` stands there; the empty one means the end of the text."""
        for literal in literals:
            if literal:
                if (yield from self._source.starts_with(literal, ahead)):
                    return True
            elif not (yield from self._source.char(ahead)):
                return True
        return False

    def _tag_name(self, tag: str, ahead: int) -> Read[tuple[str, int] | None]:
        """The name in `<tag=name>` or `<tag name="name">`, and the length of the whole; None if it is neither."""
        source = self._source
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

    def _name_character(self, ahead: int) -> Read[str]:
        character = yield from self._source.char(ahead)
        return character if character and _NAME.match(character) else ""

    def _skip_whitespace(self) -> Read[None]:
        self._source.take((yield from self._source.whitespace()))

    def _skip_fence(self) -> Read[None]:
        """Goes past the opening line of a code fence."""
        source = self._source
        if (yield from source.starts_with(FENCE)):
            source.take(len(FENCE))
            while (character := (yield from source.char())) and character.isalpha():
                source.take(1)
            yield from self._skip_whitespace()

    def _skip_tag(self) -> Read[None]:
        source = self._source
        while (character := (yield from source.char())) and character not in ">\n":
            source.take(1)
        if character == ">":
            source.take(1)

    def _skip_leftovers(self) -> Read[bool]:
        """Goes past what may be left of a call (tags, the end of a fence, brackets); True after `</tool_call>`."""
        source = self._source
        while True:
            yield from self._skip_whitespace()
            if (yield from source.starts_with(CLOSE)):
                source.take(len(CLOSE))
                yield from self._skip_whitespace()
                return True
            if (yield from source.starts_with(FENCE)):
                source.take(len(FENCE))
            elif (yield from self._any_of((FUNCTION_END, "</parameter"), 0)):
                yield from self._skip_tag()
            elif (yield from source.char()) in ("}", "]", ","):
                source.take(1)
            else:
                return False


class _ObjectCall:
    """One call in the form of Hermes: an object with a name and arguments, in whichever order."""

    def __init__(self, calls: Calls, source: Source, tools: Tools):
        self._calls = calls
        self._source = source
        self._tools = tools
        self._reader = LooseJson(source, _ENDS)
        self._tool: Tool | None = None
        self._arguments: str | None = None
        self._others: dict[str, str] = {}
        self._is_started = False

    def read(self) -> Read[bool]:
        yield from self._reader.object(lambda text: None, self._member)
        if self._is_started:
            return True
        if self._source.is_cut_off:
            return False
        if self._tool is None:
            self._tool = self._tools.accepting(list(self._others))
            if self._tool is None and self._arguments is not None:
                self._tool = self._tool_for(self._arguments)
        if self._tool is None:
            return False
        self._calls.write_call(self._tool, self._arguments or self._flat())
        return True

    def _member(self, key: str, write: Write) -> Read[None]:
        source = self._source
        source.take((yield from source.whitespace()))
        first = yield from source.char()
        if key == "function" and first == "{":
            yield from self._reader.object(lambda text: None, self._member, 1)
            return
        if key in _ARGUMENT_KEYS and first == "{" and self._tool is not None and not self._is_started:
            self._is_started = True
            yield from self._calls.arguments(self._tool, self._calls.start(self._tool))
            return
        parts: list[str] = []
        yield from self._reader.value(parts.append, "{", 1)
        if source.is_cut_off:
            return
        value = "".join(parts)
        if key in _NAME_KEYS and first in ('"', "'") and self._tool is None and json.loads(value).strip():
            self._tool = self._tools.find(json.loads(value))
        elif key in _ARGUMENT_KEYS and self._arguments is None:
            self._arguments = value
        else:
            self._others[key] = value

    def _flat(self) -> str:
        """Arguments that stand beside the name, where the tool declares them."""
        assert self._tool is not None
        is_known = self._tool.name in self._tools
        declared = [key for key in self._others if key in self._tool.properties or not is_known]
        return "{" + ", ".join(f"{json.dumps(key)}: {self._others[key]}" for key in declared) + "}"

    def _tool_for(self, arguments: str) -> Tool | None:
        keys = json.loads(arguments) if arguments.startswith("{") else {}
        return self._tools.accepting(list(keys))


def _sole_key(tool: Tool) -> str:
    """The name for an argument that came without one."""
    return next(iter(tool.properties)) if len(tool.properties) == 1 else "arguments"


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
