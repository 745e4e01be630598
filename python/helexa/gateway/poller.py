"""Keeps the fleet's picture fresh: asks every neuron, each at its own pace, how it is and what it has."""

import asyncio
import logging
import os
import time
from typing import TypeVar

import aiohttp
import msgspec

from helexa.gateway.fleet import FAILURES_UNTIL_UNHEALTHY, Node
from helexa.gateway.site import Site
from helexa.log import fields
from helexa.wire.control import Discovery, Health, Limit, ModelInfo

logger = logging.getLogger(__name__)
T = TypeVar("T")

POLL_TIMEOUT = aiohttp.ClientTimeout(total=5)
QUICK_RETRY_S = 0.5
LONGEST_PAUSE_S = 15.0
LOADING_S = 1.0  # between looks at a load under way, whose progress is shown

_DISCOVERY = msgspec.json.Decoder(Discovery)
_HEALTH = msgspec.json.Decoder(Health)
_MODELS = msgspec.json.Decoder(list[ModelInfo])


class _Listed(msgspec.Struct):
    """A model as another server tells of it."""

    id: str
    max_model_len: int | None = None


class _List(msgspec.Struct):
    data: list[_Listed]


_LISTED = msgspec.json.Decoder(_List)


def reason(error: Exception) -> str:
    """What went wrong on the way to a neuron, in a few words."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"its certificate is not trusted: {error.certificate_error}"
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno:
        return f"cannot connect: {os.strerror(error.os_error.errno).lower()}"
    if isinstance(error, aiohttp.ClientResponseError) and error.status == 401:
        return "it does not know our secret (status 401)"
    if isinstance(error, aiohttp.ClientResponseError):
        return f"answered with status {error.status}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__


class Poller:
    """One loop per neuron; `changed` wakes whoever waits for the fleet to become different."""

    def __init__(self, site: Site, session: aiohttp.ClientSession):
        self._fleet = site.fleet
        self._session = session
        self._interval_s = site.config.gateway.poll_interval_s
        self._wake = {name: asyncio.Event() for name in self._fleet.nodes}
        self._asked = {name: asyncio.Event() for name in self._fleet.nodes}
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Polls until cancelled."""
        await asyncio.gather(*(self._follow(node) for node in self._fleet.nodes.values()))

    async def first_round(self) -> None:
        """Returns when every node has been asked once."""
        await asyncio.gather(*(asked.wait() for asked in self._asked.values()))

    def suspect(self, node: Node) -> None:
        """A request could not reach the node: nothing goes there until a poll, made at once, succeeds."""
        node.suspect = True
        self.hurry(node)

    def hurry(self, node: Node) -> None:
        """Polls the node now instead of at its next turn; one that came with a reload has another poller."""
        if wake := self._wake.get(node.name):
            wake.set()

    def notify(self) -> None:
        """Wakes those in `wait`."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, timeout_s: float) -> None:
        """Returns when something about the fleet has changed, or after `timeout_s`."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except TimeoutError:
            return

    async def poll(self, node: Node) -> bool:
        """Whether the node answered; its entry in the fleet is up to date then."""
        try:
            if node.kind == "openai":
                await self._ask_other(node)
            else:
                await self._ask_neuron(node)
        except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._failed(node, error)
            return False
        self._succeeded(node)
        return True

    async def _ask_neuron(self, node: Node) -> None:
        active = node.active.copy()
        health, models = await asyncio.gather(
            self._get(node, "/health", _HEALTH), self._get(node, "/models", _MODELS)
        )
        restarted = node.health is None or health.uptime_s < node.health.uptime_s
        if node.discovery is None or restarted:
            node.discovery = await self._get(node, "/discovery", _DISCOVERY)
        _note_loads(node, models, is_first=node.health is None)
        node.health = health
        node.models = {info.id: info for info in models}
        node.loads = {load.id: load for load in health.models}
        node.last_used |= {load.id: time.monotonic() for load in health.models if load.in_flight}
        node.active_at_poll = active

    async def _ask_other(self, node: Node) -> None:
        """A server that is no neuron. One whose models are configured need not be able to list them."""
        try:
            listed = (await self._get(node, "/v1/models", _LISTED)).data
        except aiohttp.ClientResponseError as error:
            if not node.offers or error.status not in (404, 405, 501):
                raise
            listed = [_Listed(model) for model in node.offers]
        node.models = {
            card.id: ModelInfo(
                id=card.id,
                status="loaded",
                source=node.endpoint,
                device="remote",
                limit=Limit(context=card.max_model_len) if card.max_model_len else None,
            )
            for card in listed
            if not node.offers or card.id in node.offers
        }

    async def _follow(self, node: Node) -> None:
        wake = self._wake[node.name]
        while True:
            wake.clear()
            try:
                await self.poll(node)
            except Exception:
                logger.exception("poll_crashed", extra=fields(node=node.name))
            self._asked[node.name].set()
            try:
                await asyncio.wait_for(wake.wait(), self._pause_s(node))
            except TimeoutError:
                continue

    def _pause_s(self, node: Node) -> float:
        if node.failures == 0:
            return min(LOADING_S, self._interval_s) if self._is_loading(node) else self._interval_s
        if node.failures < FAILURES_UNTIL_UNHEALTHY:
            return min(QUICK_RETRY_S, self._interval_s)
        return min(
            self._interval_s * 2.0 ** min(node.failures - FAILURES_UNTIL_UNHEALTHY, 8), LONGEST_PAUSE_S
        )

    def _is_loading(self, node: Node) -> bool:
        return node.name in self._fleet.loading.values() or any(
            info.status == "loading" for info in node.models.values()
        )

    async def _get(self, node: Node, path: str, decoder: msgspec.json.Decoder[T]) -> T:
        async with self._session.get(
            node.endpoint + path, timeout=POLL_TIMEOUT, headers=node.headers, ssl=node.ssl
        ) as response:
            response.raise_for_status()
            return decoder.decode(await response.read())

    def _succeeded(self, node: Node) -> None:
        if not node.healthy:
            logger.info(
                "node_up", extra=fields(node=node.name, endpoint=node.endpoint, models=len(node.models))
            )
        node.healthy, node.suspect, node.failures, node.error = True, False, 0, None
        self.notify()

    def _failed(self, node: Node, error: Exception) -> None:
        node.failures += 1
        node.error = reason(error)
        if node.failures == FAILURES_UNTIL_UNHEALTHY:
            node.healthy = False
            logger.warning(
                "node_down", extra=fields(node=node.name, endpoint=node.endpoint, error=node.error)
            )
            self.notify()


def _note_loads(node: Node, models: list[ModelInfo], *, is_first: bool) -> None:
    """Keeps the time at which each model was seen to be loaded, and how long that took."""
    loaded = {info.id for info in models if info.status == "loaded"}
    for gone in node.loaded_since.keys() - loaded:
        del node.loaded_since[gone]
    now = time.monotonic()
    for info in models:
        if info.id in loaded:
            node.seen[info.id] = info
            node.displaced.pop(info.id, None)
        if info.load_seconds is not None:
            node.load_seconds.setdefault(info.id, info.load_seconds)
        before = node.models.get(info.id)
        is_new = before is None or before.status != "loaded" or before.loaded_at != info.loaded_at
        if info.id in loaded and is_new and not is_first:
            node.loaded_since[info.id] = now
