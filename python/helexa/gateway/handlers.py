"""The generating routes, as an application of their own in front of all others: the hot path.

Each request is one task, with one more that waits for its client to leave.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import msgspec

from helexa.errors import HelexaError, PayloadTooLarge
from helexa.gateway.auth import Keys, Principal
from helexa.gateway.billing import Bill
from helexa.gateway.dialects import Asked, Dialect, Job
from helexa.gateway.gateway import Gateway
from helexa.gateway.metrics import CLIENT_CLOSED, Meter
from helexa.gateway.placer import wait_of
from helexa.gateway.proxy import Reply, Send, relay
from helexa.gateway.upstream import Call
from helexa.log import fields
from helexa.wire.body import decode
from helexa.wire.errors import internal_error
from helexa.wire.generation import USAGE_HEADER

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Of one connection only, ours to set, or not for a neuron's eyes.
_PRIVATE_HEADERS = frozenset(
    (
        *("host", "connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "expect"),
        *("content-length", "accept-encoding", "proxy-authorization", "proxy-connection"),
        *("authorization", "x-api-key", "cookie"),
    )
)
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class ClientGone(Exception):
    """The client has closed its connection; there is nobody to answer."""


class Generating:
    """The ASGI application: POST to a generating route is answered by its endpoint, all else by `app`.

    What `app` answers gets the request's id, and its line of the log where something was done or refused.
    """

    def __init__(self, app: App, endpoints: Mapping[str, "Inference"], keys: Keys):
        self._app = app
        self._endpoints = endpoints
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope["path"]) if scope.get("method") == "POST" else None
        if endpoint is not None:
            await endpoint(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request_id, started, status = request_id_of(scope, headers), time.perf_counter(), 0

        async def tagged(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                others = [pair for pair in message.get("headers", ()) if pair[0] != b"x-request-id"]
                message["headers"] = [*others, (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        finally:
            is_a_look = scope["method"] in ("GET", "HEAD") and 200 <= status < 400
            level = logging.DEBUG if is_a_look else logging.INFO
            if logger.isEnabledFor(level):
                told = fields(
                    method=scope["method"],
                    path=scope["path"][:200],
                    request=request_id,
                    key=self._keys.name_of(headers) or None,
                    status=status or None,
                    total_ms=round((time.perf_counter() - started) * 1e3, 1),
                )
                logger.log(level, "request", extra=told)


class Inference:
    """The ASGI endpoint of one generating route."""

    def __init__(self, path: str, dialect: Dialect, gateway: Gateway):
        self._path = path
        self._dialect = dialect
        self._prepare = dialect.generating[path]
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request_id = request_id_of(scope, headers)
        meter = Meter(self._gateway.metrics, "", time.perf_counter())
        reply = Reply(send, request_id, self._dialect.id_header)
        principal, bill, failure = Principal(), None, None
        try:
            principal = self._gateway.keys.check(headers)
            meter.key = principal.id
            body = await read_body(receive, headers, self._gateway.config.gateway.max_body_bytes)
            job = await self._prepare(Asked(body, headers, principal.id))
            call = self._call(job, principal, headers, request_id, meter)
            bill = Bill(self._gateway.ledger, principal, call)
            with _while_connected(receive):
                await self._gateway.relays.run(relay(self._gateway.dispatcher, call, reply), reply)
        except ClientGone:
            meter.code = CLIENT_CLOSED
        except HelexaError as error:
            failure = error
        except Exception:
            logger.exception("request_crashed", extra=fields(path=self._path, request=request_id))
            failure = internal_error()
        finally:
            if failure is not None:
                meter.code = failure.code
            meter.end()
            if bill is not None:
                bill.settle()
            status = reply.status or (failure.status if failure else None)
            _log(self._path, request_id, principal, meter, status)
        if failure is not None and not reply.started:
            await reply.refuse(self._dialect.refuse(failure, request_id))

    def _call(
        self, job: Job, principal: Principal, headers: Mapping[str, str], request_id: str, meter: Meter
    ) -> Call:
        catalogue, nodes = self._gateway.catalogue, self._gateway.fleet.nodes.values()
        model = catalogue.resolve(job.model)
        principal.require_model(job.model, model)
        body = job.body if model == job.model else _rename(job.body, model)
        if model in catalogue.models or any(node.knows(model) for node in nodes):
            meter.model = model  # names that are not ours stay out of the metrics, which would grow with them
        passed = _forwarded(headers, request_id) | principal.headers
        wait_s, told = wait_of(headers), job.told_in_stream
        return Call(
            job.path, model, body, passed, job.stream, meter, job.translator, wait_s, told, job.shorten
        )


async def read_body(receive: Receive, headers: Mapping[str, str], max_bytes: int) -> bytes:
    """The request's whole body. Raises ClientGone, or PayloadTooLarge as soon as it is known to be."""
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise PayloadTooLarge(f"the body has {declared} bytes; at most {max_bytes} are accepted")
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > max_bytes:
            raise PayloadTooLarge(f"the body is larger than {max_bytes} bytes")
        if not message.get("more_body", False):
            return b"".join(parts)


def request_id_of(scope: Scope, headers: Mapping[str, str]) -> str:
    """The client's x-request-id if it is a plain one, else a new one; the same for the whole request."""
    known: str | None = scope.get("helexa.request_id")
    if known is None:
        given = headers.get("x-request-id", "")
        known = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope["helexa.request_id"] = known
    return known


@contextmanager
def _while_connected(receive: Receive) -> Iterator[None]:
    """A block that is cancelled when the client leaves, and raises ClientGone then."""
    task = asyncio.current_task()
    assert task is not None
    watcher = asyncio.create_task(_cancel_when_gone(task, receive))
    try:
        yield
    except asyncio.CancelledError:
        if not watcher.done() or watcher.cancelled():
            raise
        task.uncancel()
        raise ClientGone from None
    finally:
        watcher.cancel()


async def _cancel_when_gone(task: asyncio.Task[Any], receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()


def _rename(body: bytes, model: str) -> bytes:
    """The body with another model; every other value stays byte for byte, half characters apart."""
    members = decode(body, dict[str, msgspec.Raw])
    members["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(members)


def _forwarded(headers: Mapping[str, str], request_id: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in headers.items()
        if name not in _PRIVATE_HEADERS and not name.startswith("x-helexa-")
    }
    ours = {"content-type": "application/json", "accept-encoding": "identity", "x-request-id": request_id}
    return kept | ours | {USAGE_HEADER: "comment"}  # for the metrics


def _log(path: str, request_id: str, principal: Principal, meter: Meter, status: int | None) -> None:
    logger.info(
        "request",
        extra=fields(
            path=path,
            request=request_id,
            key=principal.name or None,
            model=meter.model or None,
            node=meter.node or None,
            status=status,
            error=meter.code,
            ttft_ms=None if meter.first_token_s is None else round(meter.first_token_s * 1e3, 1),
            total_ms=round((time.perf_counter() - meter.started) * 1e3, 1),
            **meter.usage,
        ),
    )
