"""The input of a Responses request as messages of chat.

What one turn of the model was, its reasoning, text and calls, are items of their own here and one assistant
message there. Nothing is left out silently: an item that a model cannot read is an error that names it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from helexa.errors import InvalidParameter
from helexa.wire.responses.custom_input import arguments_of
from helexa.wire.responses.reasoning import unseal
from helexa.wire.responses.tools import SEARCH, added_tools, names_of, qualified

Json = dict[str, Any]
_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "summary_text": "text",
          "reasoning_text": "text", "refusal": "refusal"}  # fmt: skip
_KINDS = (
    "message, reasoning, function_call, function_call_output, custom_tool_call, custom_tool_call_output, "
    "tool_search_call, tool_search_output, item_reference or additional_tools"
)


def kind_of(item: Mapping[str, Any]) -> str:
    """An item's type; the short forms of a message and of a reference need not say it."""
    kind = item.get("type")
    if kind is not None:
        return str(kind)
    return "message" if "role" in item else "item_reference" if set(item) == {"id"} else "nothing"


class Conversation:
    """Takes items in their order; `messages` is the conversation so far."""

    def __init__(self, instructions: str | None = None):
        self.messages: list[Json] = []
        self._turn: Json | None = None  # the assistant message that further items belong to
        self._calls: set[str] = set()
        if instructions:
            self.messages.append({"role": "system", "content": instructions})

    def extend(self, items: Iterable[Json], name: str) -> None:
        """Adds items; messages of errors call the list `name`. Raises InvalidParameter."""
        for index, item in enumerate(items):
            self._add(item, f"{name}[{index}]")

    def _add(self, item: Json, where: str) -> None:
        match kind_of(item):
            case "message":
                self._add_message(item, where)
            case "reasoning":
                self._add_reasoning(item, where)
            case "function_call":
                self._add_call(item, where, _string(item, "arguments", where))
            case "custom_tool_call":
                self._add_call(item, where, arguments_of(_string(item, "input", where)))
            case "function_call_output" | "custom_tool_call_output":
                self._add_output(item, where)
            case "tool_search_call":
                self._add_call({**item, "name": SEARCH}, where, _json(item.get("arguments")))
            case "tool_search_output":
                names = names_of(added_tools([item]))
                self._add_output({**item, "output": _json({"tools": names})}, where)
            case "additional_tools":
                pass  # the request offers them
            case kind:
                message = f"'{where}' is of type {kind!r:.80}; expected {_KINDS}"
                raise InvalidParameter(message, param=where)

    def _add_message(self, item: Json, where: str) -> None:
        role, content = item.get("role"), content_of(item.get("content"), f"{where}.content")
        if role not in _ROLES:
            message = f"'{where}.role' is {role!r:.80}; expected {', '.join(_ROLES)}"
            raise InvalidParameter(message, param=f"{where}.role")
        if role == "user":
            self._turn = None
            self.messages.append({"role": role, "content": content})
        elif not isinstance(content, str):
            message = f"'{where}.content' has a part that is not text; expected only text from the {role}"
            raise InvalidParameter(message, param=f"{where}.content")
        elif role == "assistant":
            self._say(content)
        else:
            self._instruct(role, content)

    def _instruct(self, role: str, text: str) -> None:
        """What leads the conversation becomes one system message, as the templates of most models demand."""
        self._turn = None
        if not self.messages:
            self.messages.append({"role": "system", "content": text})
        elif len(self.messages) == 1 and self.messages[0]["role"] == "system":
            self.messages[0]["content"] += "\n\n" + text
        else:
            self.messages.append({"role": role, "content": text})

    def _say(self, text: str) -> None:
        turn = self._turn
        if turn is None or (turn["content"] is not None and not turn.get("tool_calls")):
            turn = self._begin()
        turn["content"] = (turn["content"] or "") + text

    def _add_reasoning(self, item: Json, where: str) -> None:
        text = _reasoning_of(item, where)
        if not text:
            return
        turn = self._turn
        if turn is None or turn["content"] is not None or turn.get("tool_calls"):
            turn = self._begin()
        turn["reasoning_content"] = turn.get("reasoning_content", "") + text

    def _add_call(self, item: Json, where: str, arguments: str) -> None:
        turn = self._turn or self._begin()
        call_id, namespace = _string(item, "call_id", where), item.get("namespace")
        name = qualified(_string(item, "name", where), namespace if isinstance(namespace, str) else None)
        function = {"name": name, "arguments": arguments}
        turn.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
        self._calls.add(call_id)

    def _add_output(self, item: Json, where: str) -> None:
        call_id = _string(item, "call_id", where)
        if call_id not in self._calls:
            param = f"{where}.call_id"
            message = f"'{param}' is {call_id!r:.80}, and no such call is in the input before it"
            raise InvalidParameter(message, param=param)
        self._turn = None
        content = content_of(item.get("output"), f"{where}.output")
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": content})

    def _begin(self) -> Json:
        self._turn = {"role": "assistant", "content": None}
        self.messages.append(self._turn)
        return self._turn


def listed(items: Sequence[Json], token: str) -> list[Json]:
    """Input items as they are stored and shown: each with an id and a type, messages with parts."""
    return [_listed(item, f"item_{token}_{index}") for index, item in enumerate(items)]


def _listed(item: Json, item_id: str) -> Json:
    kind = kind_of(item)
    shown: Json = {"id": item_id, "type": kind, "status": "completed"}
    shown |= {key: value for key, value in item.items() if value is not None}
    if kind == "message" and isinstance(item.get("content"), str):
        is_said = item.get("role") == "assistant"
        part: Json = {"type": "output_text" if is_said else "input_text", "text": item["content"]}
        shown["content"] = [part | ({"annotations": []} if is_said else {})]
    if kind == "reasoning":
        shown.setdefault("summary", [])
    return shown


def content_of(content: Any, where: str) -> str | list[Json]:
    """Content as chat has it: a text if there is nothing else in it, else parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidParameter(f"'{where}' is {content!r:.80}; expected a text or parts", param=where)
    parts = [_part(part, f"{where}[{index}]") for index, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _part(part: Any, where: str) -> Json:
    if not isinstance(part, dict):
        raise InvalidParameter(f"'{where}' is {part!r:.80}; expected an object", param=where)
    kind = part.get("type")
    if isinstance(kind, str) and kind in _TEXTS:
        return {"type": "text", "text": _string(part, _TEXTS[kind], where)}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        detail = {"detail": part["detail"]} if part.get("detail") in ("low", "high", "auto") else {}
        return {"type": "image_url", "image_url": {"url": part["image_url"], **detail}}
    if kind == "input_audio" and isinstance(part.get("input_audio"), dict):
        return {"type": "input_audio", "input_audio": part["input_audio"]}
    if kind == "input_file" and isinstance(part.get("file_data"), str):
        return {"type": "file", "file": {key: part[key] for key in ("file_data", "filename") if key in part}}
    message = f"'{where}' is of type {kind!r:.80}; expected input_text, or data of an image, audio or file"
    raise InvalidParameter(message, param=where)


def _reasoning_of(item: Json, where: str) -> str:
    """The whole reasoning if the item carries it, else what it says about it."""
    sealed = item.get("encrypted_content")
    if isinstance(sealed, str):
        try:
            text = unseal(sealed)
        except ValueError as error:
            param = f"{where}.encrypted_content"
            raise InvalidParameter(f"'{param}' is damaged: {error}", param=param) from error
        if text is not None:
            return text
    for name in ("content", "summary"):
        parts = item.get(name)
        if parts:
            said = content_of(parts, f"{where}.{name}")
            return said if isinstance(said, str) else ""
    return ""


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value or {}, ensure_ascii=False)


def _string(members: Mapping[str, Any], name: str, where: str) -> str:
    value = members.get(name)
    if isinstance(value, str):
        return value
    param = f"{where}.{name}"
    raise InvalidParameter(f"'{param}' is {value!r:.80}; expected a text", param=param)
