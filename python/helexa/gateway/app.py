"""Puts the gateway together and serves it: API on one port, metrics on another, polls in the background."""

import asyncio
import gc
import logging
import signal
import socket
import time
from collections.abc import Callable

import hypercorn.asyncio
import hypercorn.config
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from helexa import __version__
from helexa.errors import BadRequest, ConfigError, HelexaError, NotFound
from helexa.gateway import listing
from helexa.gateway.anthropic import anthropic
from helexa.gateway.catalogue import Catalogue
from helexa.gateway.config import GatewayConfig, split_address
from helexa.gateway.dialects import Dialects, openai
from helexa.gateway.dialects import refuse as openai_refusal
from helexa.gateway.gateway import Gateway, running
from helexa.gateway.handlers import App, Generating, Inference, request_id_of
from helexa.gateway.responses import responses
from helexa.log import fields
from helexa.settings import log_settings
from helexa.wire.errors import internal_error

logger = logging.getLogger(__name__)

CUT_S = 2.0  # for the last words of streams that are cut


def all_dialects(gateway: Gateway) -> Dialects:
    """Every API that the gateway offers."""
    return Dialects(
        (openai(), responses(gateway.keys, gateway.store), anthropic(gateway.config.anthropic))
    )


def create_app(gateway: Gateway) -> Generating:
    """The API as an ASGI application."""
    keys, fleet, catalogue = gateway.keys, gateway.fleet, gateway.catalogue
    dialects = all_dialects(gateway)
    started = int(time.time())

    async def root(_: Request) -> Response:
        return JSONResponse({"name": "helexa-gateway", "version": __version__})

    async def health(_: Request) -> Response:
        return JSONResponse(listing.health(fleet))

    async def models(request: Request) -> Response:
        keys.check(request.headers)
        return JSONResponse(listing.model_list(fleet, catalogue, started))

    async def model(request: Request) -> Response:
        keys.check(request.headers)
        return JSONResponse(listing.model_card(fleet, catalogue, request.path_params["name"], started))

    async def fleet_report(request: Request) -> Response:
        keys.check(request.headers)
        return JSONResponse(listing.fleet_report(fleet, catalogue))

    endpoints = {
        path: Inference(path, dialect, gateway) for dialect in dialects.entries for path in dialect.generating
    }
    routes = [
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints.items()),
        *(route for dialect in dialects.entries for route in dialect.routes),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/fleet", fleet_report),
        Route("/health", health),
        Route("/", root),
    ]
    handlers = {HelexaError: _render, HTTPException: _render_http, 500: _render_bug}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.state.dialects = dialects
    return Generating(app, endpoints)


def create_metrics_app(gateway: Gateway) -> Starlette:
    """GET /metrics."""

    def metrics(_: Request) -> Response:
        return Response(
            generate_latest(gateway.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST}
        )

    return Starlette(routes=[Route("/metrics", metrics)], exception_handlers={HTTPException: _render_http})


async def _render(request: Request, error: Exception) -> Response:
    assert isinstance(error, HelexaError)
    dialects: Dialects | None = getattr(request.app.state, "dialects", None)
    refuse = dialects.of(request.url.path).refuse if dialects else openai_refusal
    refusal = refuse(error, request_id_of(request.scope, request.headers))
    return Response(refusal.body, refusal.status, dict(refusal.headers))


async def _render_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    shown: HelexaError = NotFound(f"no such route: {request.method} {request.url.path}")
    if error.status_code != 404:
        shown = BadRequest(f"{request.method} {request.url.path}: {error.detail}")
        shown.status = error.status_code
        shown.code = error.detail.lower().replace(" ", "_")
    return await _render(request, shown)


async def _render_bug(request: Request, _: Exception) -> Response:
    return await _render(request, internal_error())


async def serve(
    config: GatewayConfig,
    catalogue: Catalogue,
    *,
    stop: asyncio.Event | None = None,
    on_ready: Callable[[str, str], None] | None = None,
) -> None:
    """Serves until SIGINT, SIGTERM or `stop`; then lets streams end for `shutdown_grace_s`.

    on_ready gets the URLs of API and metrics once both accept connections. ConfigError if an address
    is taken.
    """
    log_settings(config)
    stopping = stop or asyncio.Event()
    grace_s = config.gateway.shutdown_grace_s
    with _listener(config.gateway.listen) as api, _listener(config.gateway.metrics_listen) as metrics:
        urls = _url(api), _url(metrics)
        async with running(config, catalogue) as gateway:
            if stop is None:
                for number in (signal.SIGINT, signal.SIGTERM):
                    asyncio.get_running_loop().add_signal_handler(number, stopping.set)
            if on_ready:
                on_ready(*urls)
            gc.collect()
            gc.freeze()  # what is alive now stays: later collections, which hold up every stream, skip it
            logger.info("listening", extra=fields(api=urls[0], metrics=urls[1], neurons=len(config.neurons)))
            await asyncio.gather(
                _run(create_app(gateway), api, stopping, grace_s + CUT_S),
                _run(create_metrics_app(gateway), metrics, stopping, grace_s + CUT_S),
                _drain(gateway, stopping, grace_s),
            )
    logger.info("stopped", extra=fields())


async def _drain(gateway: Gateway, stop: asyncio.Event, grace_s: float) -> None:
    """After `stop`, lets requests end for `grace_s` and then ends those that are left with an error."""
    await stop.wait()
    logger.info("stopping", extra=fields(running=len(gateway.relays), grace_s=grace_s))
    await gateway.relays.drain(grace_s)


def _listener(address: str) -> socket.socket:
    host, port = split_address(address)
    try:
        made = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024
        )
    except OSError as error:
        raise ConfigError(f"cannot listen on {address}: {error.strerror}") from None
    made.setblocking(False)
    return made


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _run(app: App, listener: socket.socket, stop: asyncio.Event, grace_s: float) -> None:
    settings = hypercorn.config.Config()
    settings.bind = [f"fd://{listener.detach()}"]
    settings.errorlog = logging.getLogger("hypercorn.error")
    settings.errorlog.setLevel(logging.WARNING)
    settings.accesslog = None
    settings.include_server_header = False
    settings.keep_alive_timeout = 75.0
    settings.keep_alive_max_requests = 2**31
    settings.graceful_timeout = grace_s
    settings.h11_max_incomplete_size = 64 * 1024
    settings.backlog = 1024
    await hypercorn.asyncio.serve(app, settings, shutdown_trigger=stop.wait)  # type: ignore[arg-type]
