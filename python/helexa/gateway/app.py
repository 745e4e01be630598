"""Puts the gateway together and serves it: API on one port, metrics on another, polls in the background."""

import asyncio
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
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
from helexa.gateway.auth import Keys
from helexa.gateway.catalogue import Catalogue
from helexa.gateway.config import GatewayConfig, split_address
from helexa.gateway.fleet import Fleet, Node
from helexa.gateway.handlers import Inference, request_id_of
from helexa.gateway.loader import Loader
from helexa.gateway.metrics import Metrics
from helexa.gateway.poller import Poller
from helexa.gateway.upstream import Dispatcher
from helexa.log import fields
from helexa.settings import log_settings
from helexa.wire.errors import error_bytes, error_headers, internal_error

logger = logging.getLogger(__name__)

INFERENCE_PATHS = ("/v1/chat/completions", "/v1/completions")
FIRST_POLL_S = 2.0


@dataclass(frozen=True)
class Gateway:
    """The parts that the routes share, alive within `running`."""

    config: GatewayConfig
    catalogue: Catalogue
    fleet: Fleet
    metrics: Metrics
    poller: Poller
    loader: Loader
    dispatcher: Dispatcher


@asynccontextmanager
async def running(config: GatewayConfig, catalogue: Catalogue) -> AsyncIterator[Gateway]:
    """A gateway whose neurons have been asked once and are polled until the end."""
    nodes = [Node(neuron.name, neuron.endpoint.rstrip("/")) for neuron in config.neurons]
    fleet = Fleet({node.name: node for node in nodes})
    metrics = Metrics(fleet)
    async with aiohttp.ClientSession(connector=_connector(), auto_decompress=False) as session:
        poller = Poller(fleet, session, config.gateway.poll_interval_s)
        loader = Loader(fleet, catalogue, session, poller, metrics, config.gateway.load_timeout_s)
        dispatcher = Dispatcher(config, catalogue, fleet, session, poller, loader, metrics)
        polling = asyncio.create_task(poller.run(), name="poller")
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(poller.first_round(), FIRST_POLL_S)
            yield Gateway(config, catalogue, fleet, metrics, poller, loader, dispatcher)
        finally:
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)
            await loader.close()


def _connector() -> aiohttp.TCPConnector:
    """No limit on connections: a neuron's queue decides. A host that vanished is noticed in half a minute."""

    def socket_of(address: Any) -> socket.socket:
        family, kind, protocol, _, _ = address
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        return made

    return aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0, socket_factory=socket_of)


def create_app(gateway: Gateway) -> Starlette:
    """The API as an ASGI application."""
    keys = Keys(gateway.config)
    fleet, catalogue = gateway.fleet, gateway.catalogue
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

    inference = [
        Route(
            path,
            Inference(
                path,
                gateway.dispatcher,
                fleet,
                catalogue,
                keys,
                gateway.metrics,
                gateway.config.gateway.max_body_bytes,
            ),
            methods=["POST"],
        )
        for path in INFERENCE_PATHS
    ]
    routes = [
        *inference,
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/fleet", fleet_report),
        Route("/health", health),
        Route("/", root),
    ]
    return Starlette(
        routes=routes,
        exception_handlers={HelexaError: _render, HTTPException: _render_http, 500: _render_bug},
    )


def create_metrics_app(gateway: Gateway) -> Starlette:
    """GET /metrics."""

    def metrics(_: Request) -> Response:
        return Response(
            generate_latest(gateway.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST}
        )

    return Starlette(routes=[Route("/metrics", metrics)], exception_handlers={HTTPException: _render_http})


async def _render(request: Request, error: Exception) -> Response:
    assert isinstance(error, HelexaError)
    headers = {
        "content-type": "application/json",
        "x-request-id": request_id_of(request.scope, request.headers),
        **error_headers(error),
    }
    return Response(error_bytes(error), error.status, headers)


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
    with _listener(config.gateway.listen) as api, _listener(config.gateway.metrics_listen) as metrics:
        async with AsyncExitStack() as stack:
            gateway = await stack.enter_async_context(running(config, catalogue))
            loop = asyncio.get_running_loop()
            if stop is None:
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.add_signal_handler(number, stopping.set)
            if on_ready:
                on_ready(_url(api), _url(metrics))
            logger.info(
                "listening", extra=fields(api=_url(api), metrics=_url(metrics), neurons=len(config.neurons))
            )
            grace_s = config.gateway.shutdown_grace_s
            await asyncio.gather(
                _run(create_app(gateway), api, stopping, grace_s),
                _run(create_metrics_app(gateway), metrics, stopping, grace_s),
            )
    logger.info("stopped")


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


async def _run(app: Starlette, listener: socket.socket, stop: asyncio.Event, grace_s: float) -> None:
    settings = hypercorn.config.Config()
    settings.bind = [f"fd://{listener.detach()}"]
    settings.errorlog = logging.getLogger("hypercorn.error")
    settings.accesslog = None
    settings.include_server_header = False
    settings.keep_alive_timeout = 75.0
    settings.keep_alive_max_requests = 2**31
    settings.graceful_timeout = grace_s
    settings.h11_max_incomplete_size = 64 * 1024
    settings.backlog = 1024
    await hypercorn.asyncio.serve(app, settings, shutdown_trigger=stop.wait)  # type: ignore[arg-type]
