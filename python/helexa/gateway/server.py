"""Hypercorn for short ways: its connections and protocol, with less to do before the first byte of an answer.

Hypercorn starts and cancels two tasks to wait for the next request of an idle connection; here it is a timer.
It writes head and first block of an answer one by one; here they leave together. No HTTP/2, no WebSockets and
no lifespan, which the API does not have. `docs/log.md` has what that is worth.
"""

import asyncio
from asyncio import AbstractEventLoop, StreamReader, StreamWriter, Task, TimerHandle
from collections.abc import Awaitable, Callable
from typing import Any

import h11
from hypercorn.asyncio.task_group import TaskGroup
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import AsyncioSingleTask, WorkerContext
from hypercorn.config import Config
from hypercorn.events import RawData
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.typing import ConnectionState, H11SendableEvent
from hypercorn.utils import parse_socket_addr, wrap_app


async def serve(app: Any, settings: Config, shutdown_trigger: Callable[[], Awaitable[object]]) -> None:
    """As `hypercorn.asyncio.serve`: until the trigger returns and streams have had `graceful_timeout`."""
    loop = asyncio.get_running_loop()
    context = WorkerContext(None)
    wrapped = wrap_app(app, settings.wsgi_max_body_size, "asgi")
    connections: dict[Task[Any], _Connection] = {}

    async def connected(reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection = _Connection(wrapped, loop, settings, context, reader, writer)
        connections[task] = connection
        try:
            await connection
        finally:
            del connections[task]

    tls = settings.create_ssl_context() if settings.ssl_enabled else None
    sockets = settings.create_sockets()
    servers = [
        await asyncio.start_server(connected, sock=listener, backlog=settings.backlog, ssl=tls)
        for listener in (*sockets.secure_sockets, *sockets.insecure_sockets)
    ]
    try:
        await shutdown_trigger()
    finally:
        await context.terminated.set()
        for server in servers:
            server.close()
        for connection in connections.values():
            connection.idle_task.expire()
        if connections:
            await asyncio.wait(connections, timeout=settings.graceful_timeout)
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


class _IdleTimer(AsyncioSingleTask):
    """In the place of a task: closes a connection on which nothing has been asked for too long."""

    def __init__(self, loop: AbstractEventLoop, timeout_s: float, close: Callable[[], Awaitable[None]]):
        super().__init__()
        self._loop = loop
        self._timeout_s = timeout_s
        self._close = close
        self._timer: TimerHandle | None = None
        self._closing: asyncio.Future[None] | None = None

    async def restart(self, task_group: object = None, action: object = None) -> None:
        self._cancel()
        self._timer = self._loop.call_later(self._timeout_s, self.expire)

    async def stop(self) -> None:
        self._cancel()

    def expire(self) -> None:
        """Closes the connection now, if it is idle."""
        if self._timer is not None:
            self._cancel()
            self._closing = asyncio.ensure_future(self._close())

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Connection(TCPServer):
    """One connection of a client."""

    def __init__(
        self,
        app: Any,
        loop: AbstractEventLoop,
        config: Config,
        context: WorkerContext,
        reader: StreamReader,
        writer: StreamWriter,
    ):
        super().__init__(app, loop, config, context, {}, reader, writer)
        self.idle_task: _IdleTimer = _IdleTimer(loop, config.keep_alive_timeout, self._initiate_server_close)

    async def run(self) -> None:
        """As hypercorn's, with our protocol."""
        try:
            connected = self.writer.get_extra_info("socket")
            client = parse_socket_addr(connected.family, connected.getpeername())
            server = parse_socket_addr(connected.family, connected.getsockname())
            tls = self.writer.get_extra_info("ssl_object") is not None
            async with TaskGroup(self.loop) as tasks:
                self._task_group = tasks
                state = ConnectionState(self.state)
                self.protocol = _Protocol(  # type: ignore[assignment]
                    *(self.app, self.config, self.context, tasks, state, tls, client, server),
                    self.protocol_send,
                )
                await self.idle_task.restart()
                await self._read_data()
        except OSError:
            pass
        finally:
            await self._close()


class _Protocol(H11Protocol):
    """HTTP/1.1 whose answers' heads wait for what follows them, which is never long."""

    _head = b""

    async def _send_h11_event(self, event: H11SendableEvent) -> None:
        try:
            data = self._head + self.connection.send(event)
        except h11.LocalProtocolError:
            if self.connection.their_state != h11.ERROR:
                raise
            return
        if isinstance(event, h11.Response):
            self._head = data
        else:
            self._head = b""
            await self.send(RawData(data=data))

    async def _check_protocol(self, event: h11.Request) -> None:
        """There is no other protocol to change to."""
