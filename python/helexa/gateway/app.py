"""Puts the gateway together and serves it: API on one port, metrics on another, polls in the background."""

import asyncio
import gc
import logging
import signal
import time
from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from helexa import __version__, server
from helexa.errors import BadRequest, HelexaError, NotFound
from helexa.gateway import listing
from helexa.gateway.admin import Admin, Reload
from helexa.gateway.anthropic import anthropic
from helexa.gateway.catalogue import Catalogue
from helexa.gateway.config import GatewayConfig, split_address
from helexa.gateway.cors import Origins
from helexa.gateway.dialects import Dialects, Refusal, openai
from helexa.gateway.dialects import refuse as openai_refusal
from helexa.gateway.gateway import Gateway, running
from helexa.gateway.handlers import ClientGone, Generating, Inference, Scope, request_id_of
from helexa.gateway.reload import Read, Reloader, watch_keys
from helexa.gateway.responses import responses
from helexa.log import fields
from helexa.serving import listen, server_settings, url_of
from helexa.settings import log_settings
from helexa.wire.errors import internal_error

logger = logging.getLogger(__name__)

CUT_S = 2.0  # for the last words of streams that are cut


def all_dialects(gateway: Gateway) -> Dialects:
    """Every API that the gateway offers."""
    return Dialects((openai(), responses(gateway.keys, gateway.store), anthropic(gateway.config.anthropic)))


def create_app(gateway: Gateway, reload: Reload | None = None) -> Origins:
    """The API as an ASGI application; `reload` reads the configuration again."""
    keys, fleet = gateway.keys, gateway.fleet
    dialects = all_dialects(gateway)
    started = int(time.time())

    async def root(_: Request) -> Response:
        return JSONResponse({"name": "helexa-gateway", "version": __version__})

    async def health(request: Request) -> Response:
        told = listing.health(fleet)
        if not keys.sees_fleet(request.headers):
            told.pop("unservable", None)
        return JSONResponse(told)

    async def models(request: Request) -> Response:
        principal, catalogue = keys.check(request.headers), gateway.catalogue
        listed = listing.model_list(fleet, catalogue, started)
        listed["data"] = [
            card for card in listed["data"] if principal.may_use(card["id"], catalogue.resolve(card["id"]))
        ]
        return JSONResponse(listed)

    async def model(request: Request) -> Response:
        principal, catalogue = keys.check(request.headers), gateway.catalogue
        name = request.path_params["name"]
        principal.require_model(name, catalogue.resolve(name))
        return JSONResponse(listing.model_card(fleet, catalogue, name, started))

    async def fleet_report(request: Request) -> Response:
        keys.check(request.headers).require_fleet()
        return JSONResponse(listing.fleet_report(fleet, gateway.catalogue))

    endpoints = {
        path: Inference(path, dialect, gateway) for dialect in dialects.entries for path in dialect.generating
    }
    routes = [
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints.items()),
        *(route for dialect in dialects.entries for route in dialect.routes),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        *Admin(gateway, reload).routes,
        Route("/fleet", fleet_report),
        Route("/health", health),
        Route("/", root),
    ]
    handlers = {
        **{HelexaError: _render, HTTPException: _render_http, 500: _render_bug},
        ClientGone: _render_nothing,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.state.dialects = dialects

    def refuse(error: HelexaError, scope: Scope) -> Refusal:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        return dialects.of(scope["path"]).refuse(error, request_id_of(scope, headers))

    return Origins(Generating(app, endpoints, keys), lambda: gateway.config.cors.allow_origins, refuse)


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


async def _render_nothing(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # goes nowhere; the log has it


async def serve(
    config: GatewayConfig,
    catalogue: Catalogue,
    *,
    read: Read | None = None,
    stop: asyncio.Event | None = None,
    on_ready: Callable[[str, str], None] | None = None,
) -> None:
    """Serves until SIGINT, SIGTERM or `stop`; then lets streams end for `shutdown_grace_s`.

    read: gets configuration and catalogue again on SIGHUP and POST /reload. on_ready gets the URLs of API and
    metrics once both accept connections. ConfigError if an address is taken or a file of [tls] is wrong.
    """
    log_settings(config)
    config.tls.check()
    stopping = stop or asyncio.Event()
    grace_s = config.gateway.shutdown_grace_s
    addresses = config.gateway.listen, config.gateway.metrics_listen
    api, metrics = (listen(*split_address(address)) for address in addresses)
    with api, metrics:
        urls = url_of(api, config.tls), url_of(metrics)
        async with running(config, catalogue) as gateway:
            reloader = Reloader(gateway, read) if read else None
            if stop is None:
                _handle_signals(stopping, reloader)
            if on_ready:
                on_ready(*urls)
            gc.collect()
            gc.freeze()  # what is alive now stays: later collections, which hold up every stream, skip it
            logger.info("listening", extra=fields(api=urls[0], metrics=urls[1], neurons=len(config.neurons)))
            app = create_app(gateway, reloader.reload if reloader else None)
            watching = asyncio.create_task(watch_keys(gateway), name="keys")
            await asyncio.gather(
                server.serve(app, server_settings(api, grace_s + CUT_S, config.tls), stopping.wait),
                server.serve(
                    create_metrics_app(gateway), server_settings(metrics, grace_s + CUT_S), stopping.wait
                ),
                _drain(gateway, stopping, grace_s),
            )
            watching.cancel()
    logger.info("stopped", extra=fields())


def _handle_signals(stopping: asyncio.Event, reloader: Reloader | None) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    reloads: set[asyncio.Task[None]] = set()

    def reload() -> None:
        if reloader is not None:
            task = asyncio.create_task(reloader.on_signal())
            reloads.add(task)
            task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)


async def _drain(gateway: Gateway, stop: asyncio.Event, grace_s: float) -> None:
    """After `stop`, lets requests end for `grace_s` and then ends those that are left with an error."""
    await stop.wait()
    logger.info("stopping", extra=fields(running=len(gateway.relays), grace_s=grace_s))
    await gateway.relays.drain(grace_s)
