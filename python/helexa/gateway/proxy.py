"""Passes a neuron's answer on to the client, byte for byte and as it comes, or through a translator.

Only whole events are forwarded, so that a neuron that dies within one cannot leave half of it on the client's
wire. Nothing is parsed here on the way. An answer that ends before its time is ended for the client with an
error event, a finish and [DONE], or with what its dialect has for that.
"""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping
from typing import Any

import aiohttp
import orjson

from helexa.errors import HelexaError, ShuttingDown, UpstreamClosed, UpstreamError, UpstreamTimeout
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
        *("connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "content-length"),
        *("proxy-authenticate", "proxy-connection", "date", "server", "x-request-id"),
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
        self.cut: HelexaError | None = None  # why we end it before its time

    async def start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self.started = True
        tagged = [*headers, *self._ids]
        await self._send({"type": "http.response.start", "status": status, "headers": tagged})

    async def write(self, block: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": block, "more_body": more})


class Relays:
    """The requests being served, so that a shutdown can end them with a word instead of silence."""

    def __init__(self) -> None:
        self._running: dict[asyncio.Task[None], Reply] = {}

    def __len__(self) -> int:
        return len(self._running)

    def start(self, work: Coroutine[Any, Any, None], reply: Reply) -> asyncio.Task[None]:
        """Runs `work`, which answers through `reply`, as a task."""
        task = asyncio.ensure_future(work)
        self._running[task] = reply
        task.add_done_callback(self._running.pop)
        return task

    async def drain(self, grace_s: float) -> None:
        """Returns when all have ended; ends them with an error after `grace_s`."""
        if self._running:
            await asyncio.wait(self._running, timeout=grace_s)
        for task, reply in list(self._running.items()):
            reply.cut = ShuttingDown("the gateway is shutting down")
            task.cancel()


async def relay(dispatcher: Dispatcher, call: Call, reply: Reply) -> None:
    """Serves one request. Raises HelexaError only while nothing has been sent."""
    opening = asyncio.create_task(dispatcher.open(call))
    upstream: Upstream | None = None
    try:
        try:
            shows_life = call.stream and call.wait_s is None  # who would not wait for long wants a status
            upstream = await (_keep_alive(opening, call, reply) if shows_life else opening)
            call.meter.node = upstream.node.name
            if upstream.response.status >= 300 or not call.stream:
                await _pass_answer(upstream, call, reply)
            else:
                await _pass_stream(upstream, call, reply)
        except HelexaError as error:
            failure = error
        except asyncio.CancelledError:
            if reply.cut is None:
                raise
            failure = reply.cut
        except Exception:
            logger.exception("relay_crashed")
            failure = internal_error()
        else:
            return
        call.meter.code = failure.code
        if upstream is not None and isinstance(failure, UpstreamError):
            upstream.distrust()
        if not reply.started:
            if not call.stream or failure.code not in call.told_in_stream:
                raise failure
            await reply.start(200, _EVENT_STREAM)
        await _end_with_error(call, reply, failure)
    finally:
        if upstream is None:
            upstream = await _abandon(opening)
        if upstream is not None:
            upstream.close()


async def _keep_alive(opening: asyncio.Task[Upstream], call: Call, reply: Reply) -> Upstream:
    """Waits; each silent second the client sees a sign of life, so that it does not take us for dead."""
    while not (await asyncio.wait((opening,), timeout=KEEP_ALIVE_S))[0]:
        if not reply.started:
            await reply.start(200, _EVENT_STREAM)
        await reply.write(call.translator.keep_alive() if call.translator else sse.KEEP_ALIVE)
    return opening.result()


async def _abandon(opening: asyncio.Task[Upstream]) -> Upstream | None:
    """What the task had opened when its client left, if anything."""
    opening.cancel()
    await asyncio.wait((opening,))
    failed = opening.cancelled() or opening.exception() is not None
    return None if failed else opening.result()


async def _pass_answer(upstream: Upstream, call: Call, reply: Reply) -> None:
    """A whole answer: one that is not streamed, or a refusal with its status and headers."""
    response = upstream.response
    try:
        body = await response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise _broken(upstream, error) from error
    if response.status >= 300:
        refusal = parse_error(response.status, body, response.headers.get("retry-after"))
        if reply.started or call.translator:
            raise refusal
        call.meter.code = refusal.code
    call.meter.feed_answer(body)
    if call.translator:
        body = call.translator.whole(body)
    await reply.start(response.status, [*_headers(response), (b"content-length", b"%d" % len(body))])
    await reply.write(body, more=False)


async def _pass_stream(upstream: Upstream, call: Call, reply: Reply) -> None:
    meter, content, held_back = call.meter, upstream.response.content, b""
    translator = call.translator
    if not reply.started:
        await reply.start(upstream.response.status, _headers(upstream.response))
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


def _headers(response: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    return [
        (name.lower(), value)
        for name, value in response.raw_headers
        if name.decode("latin-1").lower() not in _DROPPED_HEADERS
    ]
