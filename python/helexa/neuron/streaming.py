"""Requests and answers on a connection that may vanish.

Bodies have a limit, work stops when its client is gone, and streams show that they are alive.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive, Send

from helexa.errors import HelexaError, PayloadTooLarge
from helexa.wire import sse
from helexa.wire.errors import internal_error

logger = logging.getLogger(__name__)
T = TypeVar("T")
_DISCARD_S = 2.0


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises PayloadTooLarge as soon as it is known to be larger than `max_bytes`."""
    declared = request.headers.get("content-length", "")
    chunks, size = list[bytes](), 0
    stream = request.stream()
    is_too_large = declared.isdecimal() and int(declared) > max_bytes
    while not is_too_large:
        chunk = await anext(stream, None)
        if chunk is None:
            return b"".join(chunks)
        size += len(chunk)
        chunks.append(chunk)
        is_too_large = size > max_bytes
    await _discard(stream, max_bytes)
    raise PayloadTooLarge(f"the body is larger than {max_bytes} bytes", max=max_bytes)


async def _discard(stream: AsyncIterator[bytes], max_bytes: int) -> None:
    """Reads on for a moment: a connection closed over unread data is reset, and the answer lost with it."""
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            async for chunk in stream:
                size += len(chunk)
                if size > max_bytes:
                    return


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects; then ClientGone is raised.

    The body must have been read, so that the only message left is the disconnect.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and not task.cancelled():
            return task.result()
        raise ClientGone
    finally:
        for other in (task, watcher):
            other.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """Server-sent events as an ASGI response.

    The status goes out with the first event, or with the first comment after `keep_alive_s` of silence. An
    error before that is raised and can still be an ordinary answer; a later one becomes events by `failure`.
    `sign_of_life` makes the comments.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        failure: Callable[[HelexaError], bytes],
        keep_alive_s: float,
        sign_of_life: Callable[[], bytes] = lambda: sse.KEEP_ALIVE,
    ):
        self._events = events
        self._sign_of_life = sign_of_life
        self._failure = failure
        self._keep_alive_s = keep_alive_s
        self._is_started = False
        self._last_sent_s = time.monotonic()

    async def send_all(self, send: Send) -> None:
        """Answers the request. Cancelled, it stops the source of the events too."""
        ticker = asyncio.create_task(self._tick(send))
        try:
            async with aclosing(self._events):
                async for events in self._events:
                    if events:
                        await self._send(send, events)
        except Exception as error:
            if not self._is_started:
                raise
            if not isinstance(error, HelexaError):
                logger.exception("stream_failed")
            known = error if isinstance(error, HelexaError) else internal_error()
            await self._send(send, self._failure(known))
        finally:
            ticker.cancel()
            await asyncio.gather(ticker, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tick(self, send: Send) -> None:
        """Sends a comment whenever nothing was sent for a while; as a message it cannot split an event."""
        while True:
            silent_s = time.monotonic() - self._last_sent_s
            if silent_s >= self._keep_alive_s:
                await self._send(send, self._sign_of_life())
            else:
                await asyncio.sleep(self._keep_alive_s - silent_s)

    async def _send(self, send: Send, body: bytes) -> None:
        self._last_sent_s = time.monotonic()
        if not self._is_started:
            self._is_started = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})
