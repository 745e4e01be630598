"""A call in the JSON of Hermes, or in what models make of it."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from helexa.engine.output.arguments import read_arguments, silent, whole_arguments
from helexa.engine.output.loose_json import LooseJson, Write
from helexa.engine.output.source import Read, Source
from helexa.engine.output.tags import JSON_ENDS
from helexa.engine.output.tools import Tool, Tools

NAME_KEYS = ("name", "function_name", "tool_name", "tool", "function")
ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")

Start = Callable[[Tool], Write]  # announces a call, and returns what its arguments are written with


class JsonCall:
    """One call in the form of Hermes: an object with a name and arguments, in whichever order."""

    def __init__(self, source: Source, tools: Tools, start: Start):
        self._start = start
        self._source = source
        self._tools = tools
        self._reader = LooseJson(source, JSON_ENDS)
        self._tool: Tool | None = None
        self._arguments: str | None = None
        self._others: dict[str, str] = {}
        self._is_started = False

    def read(self) -> Read[bool]:
        """Reads the object and writes the call; False, with nothing written, if it is none."""
        yield from self._reader.object(silent, self._member)
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
        self._start(self._tool)(whole_arguments(self._tool, self._arguments or self._flat()))
        return True

    def _member(self, key: str, write: Write) -> Read[None]:
        source = self._source
        yield from source.skip_whitespace()
        first = yield from source.char()
        if key == "function" and first == "{":
            yield from self._reader.object(silent, self._member, 1)
            return
        if key in ARGUMENT_KEYS and first == "{" and self._tool is not None and not self._is_started:
            self._is_started = True
            yield from read_arguments(source, self._tool, self._start(self._tool))
            return
        parts: list[str] = []
        yield from self._reader.value(parts.append, "{", 1)
        if source.is_cut_off:
            return
        value = "".join(parts)
        if key in NAME_KEYS and first in ('"', "'") and self._tool is None and json.loads(value).strip():
            self._tool = self._tools.find(json.loads(value))
        elif key in ARGUMENT_KEYS and self._arguments is None:
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


def call_of(item: Mapping[str, Any], tools: Tools) -> tuple[Tool, str] | None:
    """The tool and the arguments, as JSON, of a call that has been read whole; None if it is none."""
    inner = item.get("function")
    item = inner if isinstance(inner, Mapping) else item
    name = next((item[key] for key in NAME_KEYS if isinstance(item.get(key), str)), "")
    arguments: object = next((item[key] for key in ARGUMENT_KEYS if key in item), {})
    if not name.strip():
        return None
    tool = tools.find(name)
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return tool, whole_arguments(tool, text)
