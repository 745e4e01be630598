"""From a request to a neuron's answer: place it, wait for its model, connect, try elsewhere where safe."""

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import aiohttp

from helexa.errors import (
    DevicePoisoned,
    HelexaError,
    ModelLoading,
    UnknownModel,
    UpstreamClosed,
    UpstreamError,
    UpstreamTimeout,
)
from helexa.gateway import foreign
from helexa.gateway.breaker import Breaker
from helexa.gateway.fleet import Node
from helexa.gateway.metrics import Meter
from helexa.gateway.placer import Placer
from helexa.gateway.poller import Poller, reason
from helexa.gateway.site import Site
from helexa.wire.dialect import Translator
from helexa.wire.errors import parse_error

# Answers that mean "not here, not now"; another replica may still serve the request.
_ELSEWHERE = (500, 502, 503, 504)
_LARGE_BYTES = 2**20  # are written piece by piece
# What another server says of our key or our idea of its address, which is none of the client's business.
_NOT_OURS = (301, 302, 303, 307, 308, 401, 403, 405)
# Answers that mean that a model has changed since the last poll.
_OUTDATED = (UnknownModel.code, ModelLoading.code, DevicePoisoned.code)


@dataclass(frozen=True, slots=True)
class Call:
    """One inference request as it goes to a neuron."""

    path: str
    model: str  # an id, aliases resolved
    body: bytes
    headers: Mapping[str, str]
    stream: bool
    meter: Meter
    translator: Translator | None = None  # None: the answer passes through as it is
    wait_s: float | None = None  # how long the client would wait for its model; None: any time
    told_in_stream: frozenset[str] = frozenset()  # codes of errors that are events, even as a stream's first
    shorten: Callable[[bytes, HelexaError], bytes | None] | None = None  # gives another body for one too long


class _Misunderstood(UpstreamError):
    """The gateway's configuration does not fit a server of kind openai."""


class Upstream:
    """A neuron's answer whose headers are here; its owner must call `close`."""

    def __init__(
        self,
        node: Node,
        model: str,
        response: aiohttp.ClientResponse,
        poller: Poller,
        breaker: Breaker,
        *,
        hides_usage: bool = False,
    ):
        self.node = node
        self.response = response
        self.hides_usage = hides_usage  # its stream tells a usage that the client has not asked for
        self._model = model
        self._poller = poller
        self._breaker = breaker
        self._open = True

    def distrust(self) -> None:
        """The answer has broken off: looks at the neuron now."""
        self._breaker.failed(self.node)
        self._poller.hurry(self.node)

    def close(self) -> None:
        """Cuts the connection unless all was read, which cancels the generation."""
        if self._open:
            self._open = False
            self.response.close()
            _finished(self.node, self._model, self._poller)


class Dispatcher:
    """Finds and opens the upstream of every request."""

    def __init__(self, site: Site, session: aiohttp.ClientSession, poller: Poller, placer: Placer):
        self._fleet = site.fleet
        self._session = session
        self._poller = poller
        self._placer = placer
        self._breaker = Breaker()
        limits = site.config.gateway
        connect_s = limits.connect_timeout_s
        self._stream_timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=connect_s, sock_read=limits.idle_timeout_s
        )
        self._answer_timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=connect_s, sock_read=limits.response_timeout_s
        )

    async def open(self, call: Call) -> Upstream:
        """The first answer worth passing on. Raises HelexaError when there is none."""
        tried: dict[str, HelexaError] = {}  # by node, why not there
        outdated: set[str] = set()  # nodes that had unloaded the model since the last poll
        while True:
            node = await self._placer.place(call.model, tried, call.wait_s)
            try:
                upstream = await self._connect(node, call)
            except (UpstreamClosed, _Misunderstood) as error:
                tried[node.name] = error
                continue
            moves_on = True
            try:
                moves_on = await self._should_move_on(upstream, call, tried, outdated)
            finally:
                if moves_on:
                    upstream.close()
            if not moves_on:
                return upstream

    async def _connect(self, node: Node, call: Call) -> Upstream:
        """The response's headers. A kept connection may be closed at that moment: tries once more."""
        try:
            body, headers, hides_usage = _request(node, call)
            try:
                response = await self._send(node, call, body, headers)
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                response = await self._send(node, call, body, headers)
        except BaseException as error:
            _finished(node, call.model, self._poller)
            if isinstance(error, TimeoutError | aiohttp.ClientError):
                self._breaker.failed(node)
            if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError):
                raise UpstreamTimeout(f"{node.name} did not answer in time") from error
            if isinstance(error, aiohttp.ClientError):
                self._poller.suspect(node)
                raise UpstreamClosed(f"{node.name}: {reason(error)}", retry_after_s=3) from error
            raise
        upstream = Upstream(node, call.model, response, self._poller, self._breaker, hides_usage=hides_usage)
        if node.kind == "openai" and response.status in _NOT_OURS:
            self._breaker.failed(node)
            upstream.close()
            raise _misunderstood(node, response.status)
        return upstream

    async def _send(
        self, node: Node, call: Call, body: bytes, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        call.meter.node = node.name
        return await self._session.post(
            node.endpoint + call.path,
            data=body if len(body) < _LARGE_BYTES else io.BytesIO(body),
            headers=headers,
            ssl=node.ssl,
            timeout=self._stream_timeout if call.stream else self._answer_timeout,
            allow_redirects=False,
        )

    async def _should_move_on(
        self, upstream: Upstream, call: Call, tried: dict[str, HelexaError], outdated: set[str]
    ) -> bool:
        """Whether the answer is a refusal that another node, or a fresh load, might make good."""
        response, node = upstream.response, upstream.node
        if response.status not in (404, *_ELSEWHERE):
            return False
        if response.status not in (404, 503):
            self._breaker.failed(node)
        error = await _refusal(response)
        if error.code in _OUTDATED and node.name not in outdated:
            outdated.add(node.name)
            return await self._poller.poll(node)
        if response.status == 404 or not self._has_replica(call.model, {node.name, *tried}):
            return False
        tried[node.name] = error
        self._poller.hurry(node)
        return True

    def _has_replica(self, model: str, avoid: set[str]) -> bool:
        return any(node.is_loaded(model) and node.name not in avoid for node in self._fleet.routable())


def _request(node: Node, call: Call) -> tuple[bytes, Mapping[str, str], bool]:
    """Body and headers as the node gets them, and whether it is asked for a usage only for our sake."""
    if node.kind == "neuron":
        return call.body, {**call.headers, **node.headers} if node.headers else call.headers, False
    body, hides_usage = foreign.request_body(call.body, is_stream=call.stream)
    return body, {**foreign.request_headers(call.headers), **node.headers}, hides_usage


def _misunderstood(node: Node, status: int) -> "_Misunderstood":
    if status in (401, 403):
        return _Misunderstood(f"{node.name} does not accept the key that this gateway has for it")
    return _Misunderstood(f"{node.name} answered with status {status}; its endpoint may be wrong")


async def _refusal(response: aiohttp.ClientResponse) -> HelexaError:
    """The error in the body, which the response keeps for whoever passes it on."""
    try:
        body = await response.read()
    except (aiohttp.ClientError, TimeoutError):
        body = b""
    return parse_error(response.status, body, response.headers.get("retry-after"))


def _finished(node: Node, model: str, poller: Poller) -> None:
    node.end(model, time.monotonic())
    poller.notify()
