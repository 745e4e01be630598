"""Canonical answers as Anthropic messages, whole and as events.

Signs of life. While a prompt is computed there is nothing to say, and clients give up: comments keep their
connections, pings keep most of them, but Claude Code drops a stream after 300 s without an event that is no
ping. So now and then comes one that changes nothing: an empty delta of the open block or, before the first
block, a `message_delta` that has no stop reason yet. No block is opened for it, which would be sent back.
"""

import base64
import hashlib
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from helexa.errors import HelexaError, UpstreamError
from helexa.wire import sse
from helexa.wire.anthropic.errors import error_body
from helexa.wire.dialect import Count, NeverStreamed, Said, SaidCall, SaidFunction
from helexa.wire.errors import parse_error
from helexa.wire.generation import Usage

QUIET_S = 10.0  # of silence until the message begins without its first block
LIFE_S = 20.0  # of pings until the next event that changes nothing

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal"}


class _Choice(msgspec.Struct):
    delta: Said | None = None
    message: Said | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class _Canonical(msgspec.Struct):
    """A chunk or a whole answer, as far as it is told on."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(_Canonical)
_COUNT_DECODER = msgspec.json.Decoder(Count)


class MessagesTranslator:
    """The answer to one request; `clock` is monotonic, in seconds."""

    def __init__(
        self,
        model: str,
        max_tokens: int,
        *,
        omits_thinking: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._model = model
        self._max_tokens = max_tokens
        self._omits_thinking = omits_thinking
        self._clock = clock
        self._is_started = False
        self._has_failed = False
        self._told_s = clock()  # when there was last an event that is no ping
        self._prompt_tokens = 0
        self._open: str | None = None  # the type of the open block
        self._index = -1
        self._call = -1
        self._held: tuple[str, str] = ("", "")  # a type and white space, told only with the text that follows
        self._thought: list[str] = []
        self._has_called = False
        self._finish_reason: str | None = None
        self._stop: str | None = None
        self._usage = Usage(0, 0, 0)

    def feed(self, events: bytes) -> bytes:
        found = b""
        for line in events.splitlines():
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data != b"[DONE]":
                    found += self._chunk(data)
            elif prefill := sse.Prefill.parse(line):
                self._prompt_tokens = prefill.total
                found += self._sign_of_life(prefill)
            elif line == b": keep-alive":
                found += self._sign_of_life(None)
        return found

    def keep_alive(self) -> bytes:
        return self._sign_of_life(None)

    def finish(self) -> bytes:
        if self._has_failed:
            return b""
        reason, stop = _stop_reason(
            self._finish_reason, self._stop, self._has_called, self._usage, self._max_tokens
        )
        delta = {"stop_reason": reason, "stop_sequence": stop}
        return (
            self._start()
            + self._close()
            + _event("message_delta", delta=delta, usage=_usage(self._usage))
            + _event("message_stop")
        )

    def failure(self, error: HelexaError) -> bytes:
        if self._has_failed:
            return b""
        self._has_failed = True
        return sse.encode(error_body(error), "error")

    def whole(self, body: bytes) -> bytes:
        answer = _decode(_DECODER, body)
        choice = answer.choices[0] if answer.choices else _Choice()
        said, usage = choice.message or Said(), answer.usage or Usage(0, 0, 0)
        content = list(_content(said, self._omits_thinking))
        reason, stop = _stop_reason(
            choice.finish_reason,
            _text_or_none(choice.stop_reason),
            bool(said.tool_calls),
            usage,
            self._max_tokens,
        )
        message = self._message(content, _usage(usage))
        return msgspec.json.encode(message | {"stop_reason": reason, "stop_sequence": stop})

    def _message(self, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            **{"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant"},
            **{"model": self._model, "content": content, "stop_reason": None, "stop_sequence": None},
            "usage": usage,
        }

    def _chunk(self, data: bytes) -> bytes:
        chunk = _decode(_DECODER, data)
        if self._has_failed:
            return b""
        if chunk.error is not None:
            return self.failure(parse_error(500, data))
        if chunk.usage is not None:
            self._usage = chunk.usage
        found = self._start(self._prompt_tokens)
        for choice in chunk.choices[:1]:
            if choice.delta is not None:
                found += self._say(choice.delta)
            if choice.finish_reason is not None:
                self._finish_reason = choice.finish_reason
                self._stop = _text_or_none(choice.stop_reason)
        if found:
            self._told_s = self._clock()
        return found

    def _say(self, delta: Said) -> bytes:
        found = b""
        if delta.thought:
            found += self._write("thinking", delta.thought)
        if delta.content:
            found += self._write("text", delta.content)
        for call in delta.tool_calls or ():
            found += self._write_call(call)
        return found

    def _write(self, kind: str, text: str) -> bytes:
        found = b""
        if self._open != kind:
            text = self._held[1] + text if self._held[0] == kind else text
            self._held = (kind, text)
            if not text.strip():
                return b""
            self._held = ("", "")
            found = self._close() + self._begin({"type": kind, kind: ""})
        if kind == "thinking":
            self._thought.append(text)
            if self._omits_thinking:
                is_due = not found and self._clock() - self._told_s >= LIFE_S
                return self._sign_of_life(None) if is_due else found
        return found + self._delta(kind, text)

    def _write_call(self, call: SaidCall) -> bytes:
        function, found = call.function or SaidFunction(), b""
        if self._open != "tool_use" or call.index != self._call:
            self._call, self._has_called, self._held = call.index, True, ("", "")
            found = self._close() + self._begin(_tool_use(call, {}))
        return found + (self._delta("tool_use", function.arguments) if function.arguments else b"")

    def _begin(self, block: dict[str, Any]) -> bytes:
        self._open = block["type"]
        self._index += 1
        if self._open == "thinking":
            block["signature"] = ""
        return _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, kind: str, text: str) -> bytes:
        if kind == "tool_use":
            delta = {"type": "input_json_delta", "partial_json": text}
        else:
            delta = {"type": f"{kind}_delta", kind: text}
        return _event("content_block_delta", index=self._index, delta=delta)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        found = b""
        if self._open == "thinking":
            delta = {"type": "signature_delta", "signature": _signature("".join(self._thought))}
            found = _event("content_block_delta", index=self._index, delta=delta)
            self._thought = []
        self._open = None
        return found + _event("content_block_stop", index=self._index)

    def _start(self, prompt_tokens: int = 0) -> bytes:
        """What begins the message, once. The usage at its end is the exact one."""
        if self._is_started:
            return b""
        self._is_started = True
        self._told_s = self._clock()
        message = self._message([], _usage(Usage(prompt_tokens, 0, prompt_tokens)))
        return _event("message_start", message=message) + _event("ping")

    def _sign_of_life(self, prefill: sse.Prefill | None) -> bytes:
        silent_s = self._clock() - self._told_s
        if not self._is_started:
            if silent_s >= QUIET_S:
                return self._start()
            return prefill.encode() if prefill else sse.KEEP_ALIVE
        if silent_s < LIFE_S:
            return _event("ping", progress=prefill._asdict()) if prefill else _event("ping")
        self._told_s = self._clock()
        if self._open is not None:
            return self._delta(self._open, "")
        delta = {"stop_reason": None, "stop_sequence": None}
        return _event("message_delta", delta=delta, usage={"output_tokens": 0})


class CountTranslator(NeverStreamed):
    """The answer of `/tokenize` as that of count_tokens; never a stream."""

    def failure(self, error: HelexaError) -> bytes:
        return msgspec.json.encode(error_body(error))

    def whole(self, body: bytes) -> bytes:
        return msgspec.json.encode({"input_tokens": _decode(_COUNT_DECODER, body).count})


def _event(kind: str, **members: Any) -> bytes:
    return sse.encode({"type": kind, **members}, kind)


def _content(said: Said, omits_thinking: bool) -> Iterator[dict[str, Any]]:
    if said.thought.strip():
        shown = "" if omits_thinking else said.thought
        yield {"type": "thinking", "thinking": shown, "signature": _signature(said.thought)}
    if (text := said.content or "").strip():
        yield {"type": "text", "text": text}
    for call in said.tool_calls or ():
        yield _tool_use(call, _arguments(call))


def _tool_use(call: SaidCall, arguments: dict[str, Any]) -> dict[str, Any]:
    name = call.function.name if call.function else None
    made = call.id or f"toolu_{uuid.uuid4().hex}"
    return {"type": "tool_use", "id": made, "name": name or "", "input": arguments}


def _arguments(call: SaidCall) -> dict[str, Any]:
    """The arguments; none if the answer was cut off within them."""
    try:
        found = msgspec.json.decode((call.function and call.function.arguments) or "{}")
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _signature(thought: str) -> str:
    """What clients hand back with a thought. It is opaque to them, and any is accepted."""
    return base64.b64encode(hashlib.sha256(thought.encode()).digest()).decode()


def _stop_reason(
    finish: str | None, stop: str | None, has_called: bool, usage: Usage, max_tokens: int
) -> tuple[str, str | None]:
    """Why the answer ended, and the stop sequence that ended it if one did."""
    if finish == "length" and usage.completion_tokens and usage.completion_tokens < max_tokens:
        return "model_context_window_exceeded", None
    if finish != "length" and has_called:
        return "tool_use", None
    if finish == "stop" and stop is not None:
        return "stop_sequence", stop
    return _STOP_REASONS.get(finish or "stop", "end_turn"), None


def _usage(usage: Usage) -> dict[str, Any]:
    """The parts of the prompt add up to all of it; what was computed is cached without being asked to."""
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    details = usage.completion_tokens_details
    return {
        "input_tokens": usage.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": details.reasoning_tokens if details else 0},
    }


def _text_or_none(value: str | int | None) -> str | None:
    return value if isinstance(value, str) else None


def _decode(decoder: msgspec.json.Decoder[Any], data: bytes) -> Any:
    try:
        return decoder.decode(data)
    except msgspec.DecodeError as error:
        raise UpstreamError(f"the neuron's answer cannot be read: {error}") from error
