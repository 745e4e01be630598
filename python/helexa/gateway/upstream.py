"""From a request to a neuron's answer: place it, wait for its model, connect, try elsewhere where safe."""

import io
import time
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp

from helexa.errors import (
    DevicePoisoned,
    HelexaError,
    ModelLoading,
    UnknownModel,
    UpstreamClosed,
    UpstreamTimeout,
)
from helexa.gateway.config import GatewayConfig
from helexa.gateway.fleet import Fleet, Node
from helexa.gateway.metrics import Meter
from helexa.gateway.placer import Placer
from helexa.gateway.poller import Poller, reason
from helexa.wire.dialect import Translator
from helexa.wire.errors import parse_error

# Answers that mean "not here, not now"; another replica may still serve the request.
_ELSEWHERE = (502, 503, 504)
_LARGE_BYTES = 2**20  # are written piece by piece
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


class Upstream:
    """A neuron's answer whose headers are here; its owner must call `close`."""

    def __init__(self, node: Node, model: str, response: aiohttp.ClientResponse, poller: Poller):
        self.node = node
        self.response = response
        self._model = model
        self._poller = poller
        self._open = True

    def distrust(self) -> None:
        """The answer has broken off: looks at the neuron now."""
        self._poller.hurry(self.node)

    def close(self) -> None:
        """Cuts the connection unless all was read, which cancels the generation."""
        if self._open:
            self._open = False
            self.response.close()
            _finished(self.node, self._model, self._poller)


class Dispatcher:
    """Finds and opens the upstream of every request."""

    def __init__(
        self,
        config: GatewayConfig,
        fleet: Fleet,
        session: aiohttp.ClientSession,
        poller: Poller,
        placer: Placer,
    ):
        self._fleet = fleet
        self._session = session
        self._poller = poller
        self._placer = placer
        connect_s = config.gateway.connect_timeout_s
        self._stream_timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=connect_s, sock_read=config.gateway.idle_timeout_s
        )
        self._answer_timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=connect_s, sock_read=config.gateway.response_timeout_s
        )

    async def open(self, call: Call) -> Upstream:
        """The first answer worth passing on. Raises HelexaError when there is none."""
        tried: dict[str, HelexaError] = {}  # by node, why not there
        outdated: set[str] = set()  # nodes that had unloaded the model since the last poll
        while True:
            node = await self._placer.place(call.model, tried, call.wait_s)
            try:
                upstream = await self._connect(node, call)
            except UpstreamClosed as error:
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
            try:
                response = await self._send(node, call)
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                response = await self._send(node, call)
        except BaseException as error:
            _finished(node, call.model, self._poller)
            if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError):
                raise UpstreamTimeout(f"{node.name} did not answer in time") from error
            if isinstance(error, aiohttp.ClientError):
                self._poller.suspect(node)
                raise UpstreamClosed(f"{node.name}: {reason(error)}", retry_after_s=3) from error
            raise
        return Upstream(node, call.model, response, self._poller)

    async def _send(self, node: Node, call: Call) -> aiohttp.ClientResponse:
        call.meter.node = node.name
        return await self._session.post(
            node.endpoint + call.path,
            data=call.body if len(call.body) < _LARGE_BYTES else io.BytesIO(call.body),
            headers={**call.headers, **node.headers},
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
