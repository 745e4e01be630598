"""A canonical answer as a response: its events in their order, or the whole object. Both hold the same.

The events of a stream: created, in_progress, those of each output item, then completed, incomplete or failed.
While nothing can be said, comments show that the stream is alive, and now and then in_progress is said again,
or an empty delta within an item, since comments do not reset the clocks of all clients.
"""

import secrets
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from helexa.errors import BadRequest, ContextTooLong, HelexaError, UpstreamError
from helexa.wire import sse
from helexa.wire.dialect import Count, NeverStreamed, Said, SaidCall, SaidFunction
from helexa.wire.errors import error_bytes, parse_error
from helexa.wire.responses.output import CALL_ITEMS, MessageItem, OutputItem, ReasoningItem
from helexa.wire.responses.request import FIELD_NAMES, ResponsesRequest
from helexa.wire.responses.tools import Tools

Json = dict[str, Any]
REPEAT_AFTER = 15  # signs of life, of which there is one a second, for one that is an event
_KEPT_CODES = ("context_length_exceeded", "rate_limit_exceeded", "insufficient_quota")


class _Choice(msgspec.Struct):
    delta: Said | None = None
    message: Said | None = None
    finish_reason: str | None = None
    logprobs: Json | None = None


class _Chunk(msgspec.Struct):
    """What is read of a canonical event or answer; other servers leave out what is not needed."""

    choices: list[_Choice] = []
    usage: Json | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class ResponseTranslator:
    """A `wire.dialect.Translator`. `response` is the object as it stands, at the end the final one."""

    def __init__(
        self,
        request: ResponsesRequest,
        tools: Tools,
        *,
        token: str | None = None,
        created_at: int | None = None,
    ):
        """token: 32 hex digits, which the ids of the response and its items hold; a new one if not given."""
        self.token = token or secrets.token_hex(16)
        self._request = request
        self._tools = tools
        self._events: list[bytes] = []
        self._number = 0
        self._num_signs = 0
        self._open: OutputItem | None = None
        self._call_index: int | None = None
        self._finish_reason: str | None = None
        self._has_begun = False
        self._has_ended = False
        self.response = _skeleton(request, tools, f"resp_{self.token}", created_at or int(time.time()))

    def feed(self, events: bytes) -> bytes:
        """The events that these canonical ones become."""
        self._begin()
        for line in events.splitlines():
            if self._has_ended:
                break
            if line.startswith(b"data:"):
                self._feed_data(line[5:].strip())
            elif line.startswith(b":"):
                self._feed_comment(line)
        return self._taken()

    def keep_alive(self) -> bytes:
        """A comment, and now and then an event that changes nothing."""
        self._begin()
        self._sign_of_life(sse.KEEP_ALIVE)
        return self._taken()

    def finish(self) -> bytes:
        """The last events; none if the answer has failed before."""
        if not self._has_ended:
            self._begin()
            self._complete()
        return self._taken()

    def failure(self, error: HelexaError) -> bytes:
        """response.failed, with a code and words that agents act upon."""
        if not self._has_ended:
            self._begin()
            self._fail(error)
        return self._taken()

    def whole(self, body: bytes) -> bytes:
        """The response for a whole canonical answer."""
        try:
            answer = _decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _garbled(error) from error
        self._has_begun = True
        self._take(answer)
        self._complete()
        self._events.clear()
        return msgspec.json.encode(self.response)

    def _feed_data(self, data: bytes) -> None:
        if data == b"[DONE]":
            return
        try:
            chunk = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._fail(_garbled(error))
            return
        if chunk.error is not None:
            self._fail(parse_error(502, data))
        else:
            self._take(chunk)

    def _feed_comment(self, line: bytes) -> None:
        if prefill := sse.Prefill.parse(line):
            progress = {"prompt_tokens": prefill.total, "computed_tokens": prefill.done}
            self.response["helexa_progress"] = progress
            self._sign_of_life(prefill.encode())
        elif line.startswith(b": keep-alive"):
            self._sign_of_life(sse.KEEP_ALIVE)

    def _take(self, chunk: _Chunk) -> None:
        if chunk.usage is not None:
            self.response["usage"] = _usage(chunk.usage)
        for choice in chunk.choices[:1]:  # a response has one
            self._finish_reason = choice.finish_reason or self._finish_reason
            if (delta := choice.delta or choice.message) is None:
                continue
            is_whole = choice.message is not None
            if delta.thought:
                self._reasoning().push(delta.thought)
            if delta.content:
                self._message().push(delta.content, _logprobs(choice.logprobs))
            for number, call in enumerate(delta.tool_calls or ()):
                if not self._has_ended:
                    self._push_call(call, number if is_whole else call.index)

    def _reasoning(self) -> OutputItem:
        if not isinstance(self._open, ReasoningItem):
            index = self._close()
            self._open = ReasoningItem(
                self._emit,
                index,
                self._item_token(index),
                as_summary=self._request.wants_summary,
                is_sealed=self._request.wants_sealed_reasoning,
            )
        return self._open

    def _message(self) -> OutputItem:
        if not isinstance(self._open, MessageItem):
            index = self._close()
            self._open = MessageItem(self._emit, index, self._item_token(index))
        return self._open

    def _push_call(self, call: SaidCall, number: int) -> None:
        function = call.function or SaidFunction()
        if self._call_index != number or self._open is None:
            if not function.name:
                self._fail(_garbled("a tool call without a name"))
                return
            index = self._close()
            origin = self._tools.origin(function.name)
            token = self._item_token(index)
            self._open = CALL_ITEMS[origin.kind](self._emit, index, token, call.id or f"call_{token}", origin)
            self._call_index = number
        if function.arguments:
            self._open.push(function.arguments)

    def _close(self, status: str = "completed") -> int:
        """Ends the item that is open; returns the index of the next one."""
        self.response.pop("helexa_progress", None)
        output: list[Json] = self.response["output"]
        if (item := self._open) is not None:
            is_cut = status != "completed" and self._call_index is not None
            output.append(item.abandon() if is_cut or status == "failed" else item.close(status))
        self._open = self._call_index = None
        return len(output)

    def _item_token(self, index: int) -> str:
        return f"{self.token}_{index}"

    def _begin(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._emit("response.created", response=self.response)
            self._emit("response.in_progress", response=self.response)

    def _complete(self) -> None:
        reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(
            self._finish_reason or ""
        )
        self._close("incomplete" if reason else "completed")
        if reason:
            self.response["incomplete_details"] = {"reason": reason}
        self._end("incomplete" if reason else "completed")

    def _fail(self, error: HelexaError) -> None:
        self._close("failed")
        self.response["error"] = _failure_of(error)
        self._end("failed")

    def _end(self, status: str) -> None:
        self._has_ended = True
        self.response["status"] = status
        if status == "completed":
            self.response["completed_at"] = int(time.time())
        self._emit(f"response.{status}", response=self.response)

    def _sign_of_life(self, comment: bytes) -> None:
        self._num_signs += 1
        self._events.append(comment)
        if self._num_signs % REPEAT_AFTER:
            return
        if self._open is None:
            self._emit("response.in_progress", response=self.response)
        else:
            self._open.push("")

    def _emit(self, kind: str, **members: Any) -> None:
        data = msgspec.json.encode({"type": kind, "sequence_number": self._number, **members})
        self._events.append(b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n")
        self._number += 1

    def _taken(self) -> bytes:
        taken = b"".join(self._events)
        self._events.clear()
        return taken


class CountTranslator(NeverStreamed):
    """The answer of `/tokenize` as the count of a request's input tokens; never a stream."""

    def failure(self, error: HelexaError) -> bytes:
        return error_bytes(error)

    def whole(self, body: bytes) -> bytes:
        try:
            count = msgspec.json.decode(body, type=Count).count
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _garbled(error) from error
        return msgspec.json.encode({"object": "response.input_tokens", "input_tokens": count})


def renamed(error: HelexaError) -> HelexaError:
    """`error` with a chat field in `param` and message named as the client's.

    Which item a message was made of is not known here any more: of messages, only `input` is said.
    """
    param = error.param or ""
    for theirs, ours in FIELD_NAMES.items():
        if param == theirs or param.startswith((f"{theirs}.", f"{theirs}[")):
            error.param = ours if theirs == "messages" else ours + param[len(theirs) :]
            named = f"'{param}'" if param == theirs else param
            error.message = error.message.replace(named, named.replace(param, error.param))
            break
    return error


def _failure_of(error: HelexaError) -> Json:
    """The error of a failed response: its code says whether trying again makes sense."""
    error = renamed(error)
    code = error.code if error.code in _KEPT_CODES else "server_error"
    if isinstance(error, BadRequest) or 400 <= error.status < 429:
        code = (
            error.code if isinstance(error, ContextTooLong) or error.code in _KEPT_CODES else "invalid_prompt"
        )
    message = error.message
    if error.retry_after_s is not None:
        message += f" Please try again in {max(1, round(error.retry_after_s))}s."
    return {"code": code, "message": message}


def _garbled(why: object) -> UpstreamError:
    return UpstreamError(f"the answer of the model's server is not understood: {why}")


def _logprobs(members: Mapping[str, Any] | None) -> list[Json] | None:
    found = members.get("content") if members else None
    return found if isinstance(found, list) else None


def _usage(usage: Mapping[str, Any]) -> Json:
    prompt, completion = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    written: Json = {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": prompt + completion,
    }
    if (timing := usage.get("helexa_timing")) is not None:
        written["helexa_timing"] = timing
    return written


def _skeleton(request: ResponsesRequest, tools: Tools, response_id: str, created_at: int) -> Json:
    """A response before its output."""
    reasoning, text = request.reasoning, request.text
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "model": request.model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {
            "effort": reasoning.effort if reasoning else None,
            "summary": reasoning.asked_summary if reasoning else None,
        },
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": request.is_stored,
        "temperature": request.temperature,
        "text": {
            "format": (text.format if text else None) or {"type": "text"},
            "verbosity": (text.verbosity if text else None) or "medium",
        },
        "tool_choice": request.tool_choice or "auto",
        "tools": tools.offered,
        "top_logprobs": request.top_logprobs or 0,
        "top_p": request.top_p,
        "truncation": request.truncation or "disabled",
        "usage": None,
        "user": request.user,
    }
