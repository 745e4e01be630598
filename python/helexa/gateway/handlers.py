"""The generating routes. What is wrong with a request is raised as HelexaError; `app` renders it."""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec
from starlette.datastructures import Headers

from helexa.errors import HelexaError, PayloadTooLarge
from helexa.gateway.auth import Principal
from helexa.gateway.billing import CLIENT_CLOSED, Bill
from helexa.gateway.dialects import Asked, Dialect, Job
from helexa.gateway.gateway import Gateway
from helexa.gateway.metrics import Meter
from helexa.gateway.placer import wait_of
from helexa.gateway.proxy import Reply, Send, relay
from helexa.gateway.upstream import Call
from helexa.log import fields
from helexa.wire.generation import USAGE_HEADER

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

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


class Inference:
    """The ASGI endpoint of one generating route."""

    def __init__(self, path: str, dialect: Dialect, gateway: Gateway):
        self._path = path
        self._prepare = dialect.generating[path]
        self._id_header = dialect.id_header
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        request_id = request_id_of(scope, headers)
        meter = Meter(self._gateway.metrics, "", time.perf_counter())
        reply = Reply(send, request_id, self._id_header)
        principal, bill = Principal(), None
        try:
            principal = self._gateway.keys.check(headers)
            body = await read_body(receive, headers, self._gateway.config.gateway.max_body_bytes)
            job = await self._prepare(Asked(body, headers, principal.id))
            call = self._call(job, principal, headers, request_id, meter)
            bill = Bill(self._gateway.ledger, principal, call)
            serving = self._gateway.relays.start(relay(self._gateway.dispatcher, call, reply), reply)
            await _unless_gone(receive, serving)
        except ClientGone:
            meter.code = CLIENT_CLOSED
        except HelexaError as error:
            meter.code = error.code
            raise
        except Exception:
            meter.code = HelexaError.code
            raise
        finally:
            meter.end()
            if bill is not None:
                bill.settle()
            _log(self._path, request_id, principal, meter)

    def _call(self, job: Job, principal: Principal, headers: Headers, request_id: str, meter: Meter) -> Call:
        catalogue, nodes = self._gateway.catalogue, self._gateway.fleet.nodes.values()
        model = catalogue.resolve(job.model)
        principal.require_model(job.model, model)
        body = job.body if model == job.model else _rename(job.body, model)
        if model in catalogue.models or any(model in node.models for node in nodes):
            meter.model = model  # names that are not ours stay out of the metrics, which would grow with them
        passed = _forwarded(headers, request_id) | principal.headers
        wait_s = wait_of(headers)
        return Call(job.path, model, body, passed, job.stream, meter, job.translator, wait_s)


async def read_body(receive: Receive, headers: Headers, max_bytes: int) -> bytes:
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


def request_id_of(scope: Scope, headers: Headers) -> str:
    """The client's x-request-id if it is a plain one, else a new one; the same for the whole request."""
    known: str | None = scope.get("helexa.request_id")
    if known is None:
        given = headers.get("x-request-id", "")
        known = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope["helexa.request_id"] = known
    return known


async def _unless_gone(receive: Receive, task: asyncio.Task[None]) -> None:
    """Waits for the task, which is cancelled when the client leaves; then raises ClientGone."""
    watcher = asyncio.create_task(_gone(receive))
    watcher.add_done_callback(lambda _: task.cancel())
    try:
        await task
    except asyncio.CancelledError:
        if not watcher.done() or watcher.cancelled():
            raise
        raise ClientGone from None
    finally:
        watcher.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _rename(body: bytes, model: str) -> bytes:
    """The body with another model; every other value stays byte for byte."""
    members = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    members["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(members)


def _forwarded(headers: Headers, request_id: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in headers.items()
        if name not in _PRIVATE_HEADERS and not name.startswith("x-helexa-")
    }
    ours = {"content-type": "application/json", "accept-encoding": "identity", "x-request-id": request_id}
    return kept | ours | {USAGE_HEADER: "comment"}  # for the metrics


def _log(path: str, request_id: str, principal: Principal, meter: Meter) -> None:
    logger.info(
        "request",
        extra=fields(
            path=path,
            request=request_id,
            key=principal.name or None,
            model=meter.model or None,
            node=meter.node or None,
            error=meter.code,
            ttft_ms=None if meter.first_token_s is None else round(meter.first_token_s * 1e3, 1),
            total_ms=round((time.perf_counter() - meter.started) * 1e3, 1),
            **meter.usage,
        ),
    )
