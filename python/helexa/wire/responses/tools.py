"""The tools of a Responses request as functions of chat, and the model's calls of them back.

Functions stay what they are. Custom tools, which take plain text, become functions with one parameter. The
tools of a namespace get its name before their own. A search for tools that the client makes is a function
too; what it finds comes with the input and is offered from then on.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from helexa.errors import InvalidParameter
from helexa.wire.responses.custom_input import PARAMETER

# Agents offer these beside their own tools without being asked to: left out then, and the response says so by
# what it lists under `tools`. To force one, or to offer nothing else, is refused as all hosted tools are.
_OPTIONAL = frozenset(("web_search", "web_search_2025_08_26", "web_search_preview"))
SEARCH = "tool_search"
_CHOICES = ("none", "auto", "required")

Json = dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """What the client calls a tool that the model knows by another name."""

    kind: Literal["function", "custom", "tool_search"]
    name: str
    namespace: str | None = None


class Tools:
    """What a request offers: `offered` as its client wrote it, `functions` and `choice` as chat has it."""

    def __init__(self, tools: Sequence[Json], choice: str | Json | None, added: Sequence[Json] = ()):
        """added: tools that the input brings, of which some may be known already.

        Raises InvalidParameter for a tool that no model can be offered, or a choice without its tool.
        """
        self.offered: list[Json] = []
        self.functions: list[Json] = []
        self._origins: dict[str, Origin] = {}
        left_out = []
        places = [(tool, f"tools[{index}]", False) for index, tool in enumerate(tools)]
        for tool, where, is_repeated in (*places, *((tool, "input.tools", True) for tool in added)):
            kind = _text(tool, "type", where)
            if kind in _OPTIONAL and (choice is None or choice in ("auto", "none")):
                left_out.append((where, kind))
                continue
            self._add(tool, kind, where, is_repeated=is_repeated)
            if not is_repeated:
                self.offered.append(tool)
        if left_out and not self.functions:
            raise _hosted(*left_out[0])
        self.choice = self._choose(choice)

    def origin(self, chat_name: str) -> Origin:
        """The tool that the model called; a name that was not offered is taken for a function's."""
        if found := self._origins.get(chat_name):
            return found
        alike = [origin for origin in self._origins.values() if origin.namespace and origin.name == chat_name]
        return alike[0] if len(alike) == 1 else Origin("function", chat_name)

    def _add(self, tool: Json, kind: str, where: str, *, is_repeated: bool) -> None:
        """is_repeated: whether a tool known by its name is passed over."""
        if kind == "namespace":
            namespace = _text(tool, "name", where)
            about = _described(tool, where)
            for index, member in enumerate(_objects(tool, where)):
                inner = f"{where}.tools[{index}]"
                origin = _origin(member, _text(member, "type", inner), inner, namespace)
                if not (is_repeated and qualified(origin.name, namespace) in self._origins):
                    self._offer(member, origin, inner, about)
                about = None  # said once
        else:
            origin = _origin(tool, kind, where)
            if not (is_repeated and origin.name in self._origins):
                self._offer(tool, origin, where)

    def _offer(self, tool: Json, origin: Origin, where: str, about: str | None = None) -> None:
        chat_name = qualified(origin.name, origin.namespace)
        if chat_name in self._origins:
            message = f"'{where}.name' is {origin.name!r:.80}, as that of a tool before it"
            raise InvalidParameter(message, param=where)
        self._origins[chat_name] = origin
        description = "\n\n".join(filter(None, (about, _described(tool, where))))
        function: Json = {"name": chat_name}
        if description:
            function["description"] = description
        if origin.kind == "custom":
            function["parameters"] = _parameters_of(tool, where)
        else:
            function |= {key: tool[key] for key in ("parameters", "strict") if tool.get(key) is not None}
        self.functions.append({"type": "function", "function": function})

    def _choose(self, choice: str | Json | None) -> str | Json | None:
        if choice is None or isinstance(choice, str):
            if choice is not None and choice not in _CHOICES:
                raise InvalidParameter(
                    f"'tool_choice' is {choice!r:.80}; expected none, auto, required or a tool",
                    param="tool_choice",
                )
            return choice if self.functions or choice == "required" else None
        kind = _text(choice, "type", "tool_choice")
        if kind == "allowed_tools":
            return self._allow(choice)
        if kind not in ("function", "custom"):
            raise _hosted("tool_choice", kind)
        return {"type": "function", "function": {"name": self._named(choice, "tool_choice")}}

    def _allow(self, choice: Json) -> str:
        mode, allowed_tools = choice.get("mode", "auto"), _objects(choice, "tool_choice")
        if mode not in ("auto", "required") or not allowed_tools:
            message = "'tool_choice' allows tools; expected 'mode' auto or required, and 'tools'"
            raise InvalidParameter(message, param="tool_choice")
        allowed = {
            self._named(member, f"tool_choice.tools[{index}]") for index, member in enumerate(allowed_tools)
        }
        self.functions = [tool for tool in self.functions if tool["function"]["name"] in allowed]
        return str(mode)

    def _named(self, choice: Mapping[str, Any], where: str) -> str:
        name, namespace = _text(choice, "name", where), choice.get("namespace")
        for chat_name, origin in self._origins.items():
            if origin.name == name and (namespace is None or origin.namespace == namespace):
                return chat_name
        raise InvalidParameter(f"'{where}' names {name!r:.80}, which is not among 'tools'", param=where)


def qualified(name: str, namespace: str | None) -> str:
    """The name that chat knows a tool of a namespace by."""
    if not namespace:
        return name
    return namespace + ("" if namespace.endswith("__") else "__") + name


def added_tools(items: Iterable[Json]) -> list[Json]:
    """The tools that items of the input bring."""
    return [
        tool
        for item in items
        if item.get("type") in ("additional_tools", "tool_search_output")
        for tool in _objects(item, "input")
    ]


def names_of(tools: Iterable[Json]) -> list[str]:
    """What chat calls these tools."""
    names = []
    for tool in tools:
        if tool.get("type") == "namespace":
            namespace = str(tool.get("name"))
            names += [qualified(str(member.get("name")), namespace) for member in _objects(tool, "input")]
        else:
            names.append(str(tool.get("name")))
    return names


def _origin(tool: Json, kind: str, where: str, namespace: str | None = None) -> Origin:
    """How the client calls the tool. Raises InvalidParameter for one that it does not run itself."""
    if kind == SEARCH and tool.get("execution") == "client" and namespace is None:
        return Origin("tool_search", SEARCH)
    if kind not in ("function", "custom"):
        raise _hosted(where, kind)
    return Origin("custom" if kind == "custom" else "function", _text(tool, "name", where), namespace)


def _parameters_of(tool: Json, where: str) -> Json:
    """The one text parameter of a custom tool; the grammar it shall follow is for the model to read."""
    about = "The whole input of the tool, as plain text."
    wanted = tool.get("format") or {"type": "text"}
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "grammar":
        syntax = _text(wanted, "syntax", f"{where}.format")
        about += f" It follows this {syntax} grammar:\n{_text(wanted, 'definition', f'{where}.format')}"
    elif kind != "text":
        param = f"{where}.format"
        raise InvalidParameter(f"'{param}' is {wanted!r:.80}; expected text or grammar", param=param)
    return {
        "type": "object",
        "properties": {PARAMETER: {"type": "string", "description": about}},
        "required": [PARAMETER],
        "additionalProperties": False,
    }


def _objects(members: Mapping[str, Any], where: str) -> list[Json]:
    """The tools in `members`."""
    found = members.get("tools")
    if isinstance(found, list) and all(isinstance(member, dict) for member in found):
        return found
    param = f"{where}.tools"
    raise InvalidParameter(f"'{param}' is {found!r:.80}; expected a list of tools", param=param)


def _described(tool: Mapping[str, Any], where: str) -> str | None:
    about = tool.get("description")
    if about is None or isinstance(about, str):
        return about
    param = f"{where}.description"
    raise InvalidParameter(f"'{param}' is {about!r:.80}; expected a text", param=param)


def _text(members: Mapping[str, Any], name: str, where: str) -> str:
    value = members.get(name)
    if isinstance(value, str) and value:
        return value
    param = f"{where}.{name}"
    raise InvalidParameter(f"'{param}' is {value!r:.80}; expected a text", param=param)


def _hosted(where: str, kind: str) -> InvalidParameter:
    return InvalidParameter(
        f"'{where}' is of type {kind!r:.80}, which no server here runs; "
        "expected function, custom or namespace tools, which the client runs",
        param=where,
    )
