"""Puts a neuron together and serves it; the listener is up before the first model is loaded."""

import asyncio
import logging
import os
import signal
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from helexa import server
from helexa.engine.engine import Engine
from helexa.engine.faults import is_lost
from helexa.engine.state_store import StateStore
from helexa.errors import BadRequest, HelexaError, NotFound
from helexa.log import fields
from helexa.neuron.ahead import read_vocabularies, rehearse_loads
from helexa.neuron.chat_prompt import ChatPrompts
from helexa.neuron.config import NeuronConfig, StateCacheSection
from helexa.neuron.embeddings import Embeddings
from helexa.neuron.guard import Guard
from helexa.neuron.handlers import Control
from helexa.neuron.inference import ChatInference, CompletionInference
from helexa.neuron.metrics import Metrics
from helexa.neuron.recovery import Recovery
from helexa.neuron.registry import Registry, Report
from helexa.neuron.text_work import TextWork
from helexa.neuron.texts import TextRoutes
from helexa.neuron.turns import TurnStore
from helexa.serving import is_loopback, listen, server_settings, url_of
from helexa.settings import log_settings, private_folder
from helexa.weights.parking import Parking
from helexa.weights.sources import pull
from helexa.wire.errors import error_bytes, error_headers, internal_error

logger = logging.getLogger(__name__)
_TURNS = "turns"  # the name in the state store
_LAST_CONNECTIONS_S = 3.0  # for answers that are written when everything has been drained


def _fetch(source: str, report: Report) -> Path:
    return pull(source, lambda phase, done, total: report(phase, 100 * done / total if total else 0.0))


def _state_store(section: StateCacheSection) -> StateStore | None:
    if not section.is_on:
        return None
    path = None if section.path is None else private_folder("state_cache.path", section.path)
    return StateStore(host_bytes=section.host_bytes, path=path, max_bytes=section.max_bytes)


class Neuron:
    """The parts of one daemon; `app` serves them. `fetch` and `load` are how files and engines are got."""

    def __init__(
        self,
        config: NeuronConfig,
        *,
        load: Callable[..., Engine] = Engine.load,
        fetch: Callable[[str, Report], Path] = _fetch,
    ):
        self.config = config
        self.store = _state_store(config.state_cache)
        self.metrics = Metrics(
            lambda: [info for model in self.registry if (info := model.load_info())], self.store
        )
        self.turns = TurnStore(config.prompt.turn_store_bytes) if config.prompt.reuse_turns else None
        if self.store is not None:
            load = partial(load, store=self.store)
            if self.turns is not None and (kept := self.store.get(_TURNS)) is not None:
                self.turns.restore(kept)
        if config.neuron.park_bytes:
            load = partial(load, parking=Parking(config.neuron.park_bytes))
        self.registry = Registry(config, self.metrics, fetch=fetch, load=load)
        self.text_work = TextWork()
        self.control = Control(config, self.registry, self.metrics)
        self.recovery = Recovery(self.registry, self.metrics, is_lost)

    @property
    def app(self) -> Starlette:
        parts = self.registry, self.metrics, self.config.neuron, self.text_work
        prompts = ChatPrompts(self.turns)
        app = Starlette(
            routes=[
                *self.control.routes,
                *TextRoutes(self.registry, self.config.neuron, self.text_work, prompts).routes,
                Route("/v1/chat/completions", ChatInference(*parts, prompts), methods=["POST"]),
                Route("/v1/completions", CompletionInference(*parts), methods=["POST"]),
                Route("/v1/embeddings", Embeddings(*parts), methods=["POST"]),
            ],
            middleware=[
                Middleware(Edge),
                Middleware(Guard, self.config.auth.secret, is_loopback(self.config.neuron.host)),
            ],
            exception_handlers={HelexaError: _render, HTTPException: _render_http},
            lifespan=self._lifespan,
        )
        app.router.redirect_slashes = False
        return app

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        self.metrics.tasks.set_function(lambda: len(asyncio.all_tasks(loop)))
        background = [
            asyncio.create_task(self.control.watch_devices(), name="devices"),
            asyncio.create_task(self._activate(), name="default models"),
            asyncio.create_task(self.recovery.watch(), name="recovery"),
        ]
        try:
            yield
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await self.registry.close(0.0)
            self.text_work.close()
            if self.store is not None and self.turns is not None:
                await asyncio.to_thread(self.store.put, _TURNS, [self.turns.dump()])

    async def _activate(self) -> None:
        await self.registry.activate()
        await self.registry.before_loads(partial(rehearse_loads, self.config.engine.device))
        await asyncio.to_thread(read_vocabularies, self.config.models)


class Edge:
    """The outermost layer: gives each request an id, and makes an answer of what should not have happened."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if 0 < len(given) <= 128 and given.isprintable() else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        is_started = False

        async def tagged(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode("latin-1"))]
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        except ClientDisconnect:
            pass
        except Exception:
            logger.exception("unexpected", extra=fields(path=scope["path"], request_id=request_id))
            if not is_started:
                await _answer(internal_error())(scope, receive, tagged)


def _answer(error: HelexaError) -> Response:
    return Response(
        error_bytes(error), error.status, {"content-type": "application/json", **error_headers(error)}
    )


async def _render(_: Request, error: Exception) -> Response:
    assert isinstance(error, HelexaError)
    return _answer(error)


async def _render_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    shown: HelexaError = NotFound(f"no such route: {request.method} {request.url.path}")
    if error.status_code != 404:
        allowed = (error.headers or {}).get("Allow", "")
        shown = BadRequest(
            f"{request.method} {request.url.path} is not allowed; use {allowed or 'another method'}"
        )
        shown.status = error.status_code
        shown.code = error.detail.lower().replace(" ", "_")
    response = _answer(shown)
    response.headers.update(error.headers or {})
    return response


async def serve(
    config: NeuronConfig, *, stop: asyncio.Event | None = None, on_ready: Callable[[str], None] | None = None
) -> None:
    """Serves until SIGINT, SIGTERM or `stop`; then lets running requests end for `shutdown_grace_s`.

    A second signal ends the process at once. on_ready gets the URL as soon as connections are accepted.
    Raises ConfigError if the address is taken or a file of [tls] is wrong.
    """
    log_settings(config)
    config.tls.check()
    neuron = Neuron(config)
    stopping = stop or asyncio.Event()
    with listen(config.neuron.host, config.neuron.port) as listener:
        if stop is None:
            _stop_on_signals(stopping)
        url = url_of(listener, config.tls)
        logger.info("listening", extra=fields(url=url, models=",".join(entry.id for entry in config.models)))
        if on_ready:
            on_ready(url)

        async def drained() -> None:
            await stopping.wait()
            logger.info("draining", extra=fields(grace_s=config.neuron.shutdown_grace_s))
            await neuron.registry.close(config.neuron.shutdown_grace_s)

        app, settings = neuron.app, server_settings(listener, _LAST_CONNECTIONS_S, config.tls)
        async with app.router.lifespan_context(app):
            await server.serve(app, settings, drained)
    logger.info("stopped")


def _stop_on_signals(stopping: asyncio.Event) -> None:
    def on_signal(number: int) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
