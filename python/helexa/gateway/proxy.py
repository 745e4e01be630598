"""Passes a neuron's answer on to the client, byte for byte and as it comes, or through a translator.

Only whole events are forwarded, so that a neuron that dies within one cannot leave half of it on the client's
wire. Nothing is parsed here on the way. An answer that ends before its time is ended for the client with an
error event, a finish and [DONE], or with what its dialect has for that.
"""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import replace
from typing import Any

import aiohttp
import orjson

from helexa.errors import (
    ContextTooLong,
    HelexaError,
    ShuttingDown,
    UpstreamClosed,
    UpstreamError,
    UpstreamTimeout,
)
from helexa.gateway.dialects import Refusal
from helexa.gateway.foreign import ANSWER_HEADERS, without_usage
from helexa.gateway.upstream import Call, Dispatcher, Upstream
from helexa.wire import sse
from helexa.wire.errors import error_body, internal_error, parse_error

logger = logging.getLogger(__name__)

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
KEEP_ALIVE_S = 1.0
_ERROR_EVENT = re.compile(rb'^data: \{"error":.*?"code": ?"(\w+)"', re.MULTILINE)

_EVENT_STREAM = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_DROPPED_HEADERS = frozenset(
    (
        *(b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade"),
        *(b"content-length", b"proxy-authenticate", b"proxy-connection", b"date", b"server", b"x-request-id"),
    )
)


class Reply:
    """The client's side of a request: remembers whether the answer has begun."""

    def __init__(self, send: Send, request_id: str, id_header: str | None = None):
        self._send = send
        value = request_id.encode("latin-1")
        self._ids = [(b"x-request-id", value)]
        if id_header:
            self._ids.append((id_header.encode(), value))
        self.started = False
        self.status: int | None = None
        self.cut: HelexaError | None = None  # why we end it before its time

    async def start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self.started = True
        self.status = status
        tagged = [*headers, *self._ids]
        await self._send({"type": "http.response.start", "status": status, "headers": tagged})

    async def write(self, block: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": block, "more_body": more})

    async def refuse(self, refusal: Refusal) -> None:
        """The whole answer to a request that failed before it began."""
        headers = [
            (name.encode("latin-1"), value.encode("latin-1")) for name, value in refusal.headers.items()
        ]
        headers.append((b"content-length", b"%d" % len(refusal.body)))
        self.started = True
        await self._send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self.write(refusal.body, more=False)


class Relays:
    """The requests being served, so that a shutdown can end them with a word instead of silence."""

    def __init__(self) -> None:
        self._running: dict[asyncio.Task[Any], Reply] = {}

    def __len__(self) -> int:
        return len(self._running)

    async def run(self, work: Awaitable[None], reply: Reply) -> None:
        """Awaits `work`, which answers through `reply`."""
        task = asyncio.current_task()
        assert task is not None
        self._running[task] = reply
        try:
            await work
        finally:
            del self._running[task]

    async def drain(self, grace_s: float) -> None:
        """Returns when all have ended; ends them with an error after `grace_s`."""
        if self._running:
            await asyncio.wait(self._running, timeout=grace_s)
        for task, reply in list(self._running.items()):
            reply.cut = ShuttingDown("the gateway is shutting down")
            task.cancel()


async def relay(dispatcher: Dispatcher, call: Call, reply: Reply) -> None:
    """Serves one request. Raises HelexaError only while nothing has been sent."""
    upstream: Upstream | None = None
    try:
        if call.stream and call.wait_s is None:  # who would not wait for long wants a status
            async with _Silence(call, reply):
                upstream = await _open(dispatcher, call)
        else:
            upstream = await _open(dispatcher, call)
        if upstream.response.status >= 300 or not call.stream:
            await _pass_answer(upstream, call, reply)
        else:
            await _pass_stream(upstream, call, reply)
        return
    except HelexaError as error:
        failure = error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if reply.cut is None or task is None:
            raise
        task.uncancel()
        failure = reply.cut
    except Exception:
        logger.exception("relay_crashed")
        failure = internal_error()
    finally:
        if upstream is not None:
            upstream.close()
    call.meter.code = failure.code
    if upstream is not None and isinstance(failure, UpstreamError):
        upstream.distrust()
    if not reply.started:
        if not call.stream or failure.code not in call.told_in_stream:
            raise failure
        await reply.start(200, _EVENT_STREAM)
    await _end_with_error(call, reply, failure)


async def _open(dispatcher: Dispatcher, call: Call) -> Upstream:
    """A neuron's answer; a request that may be shortened is sent again while it is refused as too long."""
    upstream = await dispatcher.open(call)
    while call.shorten is not None and upstream.response.status == 400:
        try:
            refusal = parse_error(400, await _read(upstream))
            body = call.shorten(call.body, refusal) if refusal.code == ContextTooLong.code else None
            if body is None:
                return upstream
        except BaseException:
            upstream.close()
            raise
        upstream.close()
        call = replace(call, body=body)
        upstream = await dispatcher.open(call)
    return upstream


class _Silence:
    """Within it, the client of a stream sees a sign of life each second, so that it goes on waiting."""

    def __init__(self, call: Call, reply: Reply):
        self._call = call
        self._reply = reply
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        self._wait()

    async def __aexit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._task is not None:
            await self._task  # what it is writing comes before what follows

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(KEEP_ALIVE_S, self._begin)

    def _begin(self) -> None:
        if self._task is None or self._task.done():  # else the client does not read
            self._task = asyncio.create_task(self._sign())
        self._wait()

    async def _sign(self) -> None:
        translator = self._call.translator
        if not self._reply.started:
            await self._reply.start(200, _EVENT_STREAM)
        await self._reply.write(translator.keep_alive() if translator else sse.KEEP_ALIVE)


async def _pass_answer(upstream: Upstream, call: Call, reply: Reply) -> None:
    """A whole answer: one that is not streamed, or a refusal with its status and headers."""
    response, body = upstream.response, await _read(upstream)
    if response.status >= 300:
        refusal = parse_error(response.status, body, response.headers.get("retry-after"))
        if reply.started or call.translator or upstream.node.kind == "openai":
            raise refusal
        call.meter.code = refusal.code
    call.meter.feed_answer(body)
    if call.translator:
        body = call.translator.whole(body)
    await reply.start(response.status, [*_headers(upstream), (b"content-length", b"%d" % len(body))])
    await reply.write(body, more=False)


async def _read(upstream: Upstream) -> bytes:
    """The whole body."""
    try:
        return await upstream.response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise _broken(upstream, error) from error


async def _pass_stream(upstream: Upstream, call: Call, reply: Reply) -> None:
    meter, content, held_back = call.meter, upstream.response.content, b""
    translator = call.translator
    if not reply.started:
        await reply.start(upstream.response.status, _headers(upstream))
    try:
        while chunk := await content.readany():
            if held_back:
                chunk = held_back + chunk
                held_back = b""
            if not chunk.endswith(b"\n\n"):
                end = _end_of_events(chunk)
                held_back = chunk[end:]
                chunk = chunk[:end]
                if not chunk:
                    continue
            meter.feed(chunk)
            if upstream.hides_usage:
                chunk = without_usage(chunk)
            if translator is None:
                await reply.write(chunk)
            elif block := translator.feed(chunk):
                await reply.write(block)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise _broken(upstream, error) from error
    if not meter.tail.rstrip().endswith(b"[DONE]"):
        raise UpstreamClosed(f"{upstream.node.name} ended its answer before it was complete")
    if found := _ERROR_EVENT.search(meter.tail):
        call.meter.code = found[1].decode()
    await reply.write(translator.finish() if translator else b"", more=False)


def _end_of_events(chunk: bytes) -> int:
    """Where the last whole event of the chunk ends; 0 if there is none."""
    return max(
        chunk.rfind(b"\n\n") + 2 if b"\n\n" in chunk else 0,
        chunk.rfind(b"\n\r\n") + 3 if b"\n\r\n" in chunk else 0,
    )


def _broken(upstream: Upstream, error: Exception) -> HelexaError:
    name = upstream.node.name
    if isinstance(error, TimeoutError):
        return UpstreamTimeout(f"{name} has fallen silent within its answer")
    return UpstreamClosed(f"{name} closed the connection within its answer")


async def _end_with_error(call: Call, reply: Reply, error: HelexaError) -> None:
    """Says in the stream what went wrong, then ends it as a complete answer would."""
    if call.translator:
        last_words = call.translator.failure(error)
    else:
        last_words = sse.encode(error_body(error)) + sse.encode(_finish(call)) + sse.DONE
    await reply.write(last_words, more=False)


def _finish(call: Call) -> dict[str, Any]:
    """The chunk that ends the answer; it continues the last event's id where there was one."""
    chunk: dict[str, Any] = {"id": "", "created": int(time.time()), "model": call.model}
    for event in sse.Parser().feed(call.meter.tail):
        try:
            last = orjson.loads(event.data)
        except orjson.JSONDecodeError:
            continue
        chunk.update(
            {key: last[key] for key in ("id", "created", "model") if isinstance(last, dict) and key in last}
        )
    if call.path.endswith("/chat/completions"):
        choice: dict[str, Any] = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "error"}
        return {**chunk, "object": "chat.completion.chunk", "choices": [choice]}
    choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": "error"}
    return {**chunk, "object": "text_completion", "choices": [choice]}


def _headers(upstream: Upstream) -> list[tuple[bytes, bytes]]:
    pairs = [(name.lower(), value) for name, value in upstream.response.raw_headers]
    if upstream.node.kind == "openai":
        return [(name, value) for name, value in pairs if name in ANSWER_HEADERS]
    return [(name, value) for name, value in pairs if name not in _DROPPED_HEADERS]
