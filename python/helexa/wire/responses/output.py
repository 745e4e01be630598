"""The items of a response while they are written: each says its own events, from `added` to `done`."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from helexa.wire.responses.custom_input import CustomInput
from helexa.wire.responses.reasoning import seal
from helexa.wire.responses.tools import Origin

Json = dict[str, Any]
Emit = Callable[..., None]  # emit(type, **members)


class OutputItem(ABC):
    """One item; `item` is its latest state, and after `close` its final one."""

    def __init__(self, emit: Emit, index: int, item: Json):
        self.item = item
        self._emit = emit
        self._where = {"item_id": item["id"], "output_index": index}
        emit("response.output_item.added", output_index=index, item=dict(item))

    @abstractmethod
    def push(self, text: str, logprobs: list[Json] | None = None) -> None:
        """A further piece of the item's text; an empty one is told too and changes nothing."""

    def close(self, status: str = "completed") -> Json:
        """Ends the item; returns its final state."""
        self._end(status)
        if "status" in self.item:
            self.item["status"] = status
        self._emit(
            "response.output_item.done", output_index=self._where["output_index"], item=dict(self.item)
        )
        return self.item

    def abandon(self) -> Json:
        """Ends the item without a word: agents run a call, or keep a text, once they hear that it is done."""
        self._emit = _say_nothing
        return self.close("incomplete")

    @abstractmethod
    def _end(self, status: str) -> None: ...


class MessageItem(OutputItem):
    """The model's text."""

    def __init__(self, emit: Emit, index: int, token: str):
        members = {"type": "message", "status": "in_progress", "role": "assistant", "content": []}
        super().__init__(emit, index, {"id": f"msg_{token}", **members})
        self._pieces: list[str] = []
        self._logprobs: list[Json] = []
        emit("response.content_part.added", **self._where, content_index=0, part=self._part(""))

    def push(self, text: str, logprobs: list[Json] | None = None) -> None:
        self._pieces.append(text)
        self._logprobs += logprobs or ()
        self._emit(
            "response.output_text.delta", **self._where, content_index=0, delta=text, logprobs=logprobs or []
        )

    def _end(self, status: str) -> None:
        part = self._part("".join(self._pieces))
        self.item["content"] = [part]
        self._emit(
            "response.output_text.done",
            **self._where,
            content_index=0,
            text=part["text"],
            logprobs=self._logprobs,
        )
        self._emit("response.content_part.done", **self._where, content_index=0, part=part)

    def _part(self, text: str) -> Json:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}


class ReasoningItem(OutputItem):
    """The model's reasoning: as its text, or as the summary that the client asked for."""

    def __init__(self, emit: Emit, index: int, token: str, *, as_summary: bool, is_sealed: bool):
        super().__init__(emit, index, {"id": f"rs_{token}", "type": "reasoning", "summary": []})
        self._pieces: list[str] = []
        self._is_sealed = is_sealed
        self._as_summary = as_summary
        self._place: Json
        if as_summary:
            self._event, self._part_event = (
                "response.reasoning_summary_text",
                "response.reasoning_summary_part",
            )
            self._place, self._kind = {**self._where, "summary_index": 0}, "summary_text"
        else:
            self._event, self._part_event = "response.reasoning_text", "response.content_part"
            self._place, self._kind = {**self._where, "content_index": 0}, "reasoning_text"
        emit(f"{self._part_event}.added", **self._place, part={"type": self._kind, "text": ""})

    def push(self, text: str, logprobs: list[Json] | None = None) -> None:
        self._pieces.append(text)
        self._emit(f"{self._event}.delta", **self._place, delta=text)

    def _end(self, status: str) -> None:
        text = "".join(self._pieces)
        part = {"type": self._kind, "text": text}
        self.item["summary" if self._as_summary else "content"] = [part]
        if self._is_sealed:
            self.item["encrypted_content"] = seal(text)
        self._emit(f"{self._event}.done", **self._place, text=text)
        self._emit(f"{self._part_event}.done", **self._place, part=part)


class FunctionCallItem(OutputItem):
    """A call of a function; the text is its arguments."""

    def __init__(self, emit: Emit, index: int, token: str, call_id: str, origin: Origin):
        members = {"type": "function_call", "status": "in_progress", "arguments": "", "call_id": call_id}
        super().__init__(emit, index, {"id": f"fc_{token}", **members, **_named(origin)})
        self._pieces: list[str] = []

    def push(self, text: str, logprobs: list[Json] | None = None) -> None:
        self._pieces.append(text)
        self._emit("response.function_call_arguments.delta", **self._where, delta=text)

    def _end(self, status: str) -> None:
        arguments = "".join(self._pieces) or ("{}" if status == "completed" else "")
        self.item["arguments"] = arguments
        self._emit("response.function_call_arguments.done", **self._where, arguments=arguments)


class CustomCallItem(OutputItem):
    """A call of a custom tool; pushed is JSON, as the model calls functions, and said is the text inside."""

    def __init__(self, emit: Emit, index: int, token: str, call_id: str, origin: Origin):
        members = {"type": "custom_tool_call", "status": "in_progress", "call_id": call_id, "input": ""}
        super().__init__(emit, index, {"id": f"ctc_{token}", **members, **_named(origin)})
        self._text = CustomInput()
        self._pieces: list[str] = []

    def push(self, text: str, logprobs: list[Json] | None = None) -> None:
        said = self._text.feed(text)
        if said or not text:
            self._say(said)

    def _end(self, status: str) -> None:
        if rest := self._text.finish():
            self._say(rest)
        said = "".join(self._pieces)
        self.item["input"] = said
        self._emit("response.custom_tool_call_input.done", **self._where, input=said)

    def _say(self, text: str) -> None:
        self._pieces.append(text)
        self._emit("response.custom_tool_call_input.delta", **self._where, delta=text)


class ToolSearchItem(OutputItem):
    """A search for further tools, which the client makes; there are no events of its arguments."""

    def __init__(self, emit: Emit, index: int, token: str, call_id: str, _: Origin):
        members = {"type": "tool_search_call", "status": "in_progress", "call_id": call_id}
        super().__init__(
            emit, index, {"id": f"tsc_{token}", **members, "execution": "client", "arguments": {}}
        )
        self._pieces: list[str] = []

    def push(self, text: str, logprobs: list[Json] | None = None) -> None:
        self._pieces.append(text)

    def _end(self, status: str) -> None:
        said = "".join(self._pieces)
        try:
            self.item["arguments"] = json.loads(said or "{}")
        except ValueError:
            self.item["arguments"] = said


CALL_ITEMS: dict[str, type[FunctionCallItem | CustomCallItem | ToolSearchItem]] = {
    "function": FunctionCallItem,
    "custom": CustomCallItem,
    "tool_search": ToolSearchItem,
}


def _named(origin: Origin) -> Json:
    return {"name": origin.name} | ({"namespace": origin.namespace} if origin.namespace else {})


def _say_nothing(_: str, **__: Any) -> None:
    """An `Emit` to nobody."""
