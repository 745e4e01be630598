"""The server of both daemons: aiohttp's, whose parser is compiled, before an ASGI application.

Hypercorn takes more time for a request than all the rest of the gateway (`docs/log.md` has the numbers), and
keeps a connection that its client has closed until the keep-alive time is over. Its settings stay: they open
sockets and read certificates. HTTP/1.1 alone, no WebSockets and no lifespan.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

from aiohttp import web
from hypercorn.config import Config

from helexa.errors import BadRequest
from helexa.wire.errors import error_bytes, internal_error

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
SERVER = "helexa"
MAX_LINE_BYTES = 64 * 1024  # of the request line, and of one header


async def serve(app: Any, settings: Config, shutdown_trigger: Callable[[], Awaitable[object]]) -> None:
    """As `hypercorn.asyncio.serve`: until the trigger returns and streams have had `graceful_timeout`."""
    settings.alpn_protocols = ["http/1.1"]
    tls = settings.create_ssl_context() if settings.ssl_enabled else None
    server = _Server(app, settings.keep_alive_timeout)
    sockets = settings.create_sockets()
    loop = asyncio.get_running_loop()
    listeners = [
        await loop.create_server(server, sock=listener, backlog=settings.backlog, ssl=tls)
        for listener in (*sockets.secure_sockets, *sockets.insecure_sockets)
    ]
    try:
        await shutdown_trigger()
    finally:
        for listener in listeners:
            listener.close()
        server.pre_shutdown()  # those that are idle
        await server.shutdown(settings.graceful_timeout)


class _Server(web.Server):
    """Makes the protocol of each connection."""

    def __init__(self, app: Any, keep_alive_s: float):
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            request.protocol.has_asked()  # type: ignore[attr-defined]
            exchange = _Exchange(request)
            await app(exchange.scope(), exchange.receive, exchange.send)
            return exchange.response or _plain_answer(500)

        super().__init__(answer)
        self._keep_alive_s = keep_alive_s

    def __call__(self) -> "_Connection":
        return _Connection(
            self,
            patience_s=self._keep_alive_s,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=self._keep_alive_s,
            access_log=None,
            logger=logger,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            auto_decompress=False,
        )


class _Connection(web.RequestHandler):
    """The protocol of one connection. It remembers whether its client is there, and waits for it to ask.

    aiohttp itself waits for ever for the first request.
    """

    __slots__ = ("_patience_s", "_waiting", "gone")

    def __init__(self, manager: web.Server, *, patience_s: float, **more: Any):
        super().__init__(manager, **more)
        self._patience_s = patience_s

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = loop.create_future()
        self._waiting = self.close_unless_heard_of()
        super().connection_made(transport)

    def close_unless_heard_of(self) -> asyncio.TimerHandle:
        """Closes the connection after a while, unless it is cancelled."""
        return asyncio.get_running_loop().call_later(self._patience_s, self.force_close)

    def has_asked(self) -> None:
        """A request has come."""
        self._waiting.cancel()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._waiting.cancel()
        if not self.gone.done():
            self.gone.set_result(None)
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What a request gets that is no HTTP, or that the application crashed on."""
        if status >= 500:
            logger.error("request_crashed", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun")
        return _plain_answer(status)


def _plain_answer(status: int) -> web.Response:
    error = BadRequest("the request is not HTTP/1.1") if status < 500 else internal_error()
    answer = web.Response(status=status, body=error_bytes(error), content_type="application/json")
    answer.headers["server"] = SERVER
    answer.force_close()
    return answer


class _Exchange:
    """One request and its answer, as ASGI has them."""

    def __init__(self, request: web.BaseRequest):
        self.response: web.StreamResponse | None = None
        self._request = request
        self._is_read = False
        self._is_head = request.method == "HEAD"
        self._expects = request.headers.get("expect", "").lower() == "100-continue"

    def scope(self) -> dict[str, Any]:
        request = self._request
        raw_path, _, query = request.raw_path.partition("?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.1"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": "https"
            if request.transport and request.transport.get_extra_info("sslcontext")
            else "http",
            "path": unquote(raw_path) if "%" in raw_path else raw_path,
            "raw_path": raw_path.encode("latin-1", "replace"),
            "query_string": query.encode("latin-1", "replace"),
            "root_path": "",
            "headers": [(name.lower(), value) for name, value in request.raw_headers],
            "client": request.transport.get_extra_info("peername") if request.transport else None,
            "server": request.transport.get_extra_info("sockname") if request.transport else None,
            "state": {},
            "extensions": {},
        }

    async def receive(self) -> Message:
        """The next block of the body; after its end, that the client has left.

        So does one that sends nothing for as long as an idle connection may stay open.
        """
        protocol, content = self._request.protocol, self._request.content
        assert isinstance(protocol, _Connection)
        if self._is_read:
            await asyncio.wait((protocol.gone,))
            return {"type": "http.disconnect"}
        if self._expects:
            self._expects = False
            if self._request.transport is not None:
                self._request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        waiting = protocol.close_unless_heard_of()
        try:
            block = await content.readany()
        except (ConnectionError, web.RequestPayloadError):
            self._is_read = True
            return {"type": "http.disconnect"}
        finally:
            waiting.cancel()
        self._is_read = content.at_eof()
        return {"type": "http.request", "body": block, "more_body": not self._is_read}

    async def send(self, message: Message) -> None:
        """A part of the answer; what comes after the client has left goes nowhere."""
        try:
            if message["type"] == "http.response.start":
                await self._start(message)
            else:
                await self._write(message.get("body", b""), is_last=not message.get("more_body", False))
        except ConnectionError:
            return

    async def _start(self, message: Message) -> None:
        response = web.StreamResponse(status=message["status"])
        for name, value in message["headers"]:
            response.headers.add(name.decode(), value.decode("utf-8", "replace"))
        response.headers.setdefault("server", SERVER)
        self.response = response
        await response.prepare(self._request)

    async def _write(self, block: bytes, *, is_last: bool) -> None:
        assert self.response is not None
        if self._is_head:
            block = b""
        if is_last:
            await self.response.write_eof(block)
        elif block:
            await self.response.write(block)
