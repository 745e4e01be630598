"""The parts of a running gateway, put together."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp

from helexa.gateway.auth import Keys
from helexa.gateway.catalogue import Catalogue
from helexa.gateway.config import GatewayConfig
from helexa.gateway.fleet import Fleet, Node
from helexa.gateway.housekeeper import Housekeeper
from helexa.gateway.loader import Loader
from helexa.gateway.metrics import Metrics
from helexa.gateway.placer import Placer
from helexa.gateway.poller import Poller
from helexa.gateway.proxy import Relays
from helexa.gateway.quota import Ledger
from helexa.gateway.store import ResponseStore
from helexa.gateway.upstream import Dispatcher

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
    relays: Relays
    keys: Keys
    ledger: Ledger
    store: ResponseStore


@asynccontextmanager
async def running(config: GatewayConfig, catalogue: Catalogue) -> AsyncIterator[Gateway]:
    """A gateway whose neurons have been asked once and are polled until the end."""
    nodes = [Node(neuron.name, neuron.endpoint.rstrip("/")) for neuron in config.neurons]
    fleet = Fleet({node.name: node for node in nodes})
    metrics = Metrics(fleet)
    store = ResponseStore(config.store)
    async with aiohttp.ClientSession(connector=_connector(), auto_decompress=False) as session:
        poller = Poller(fleet, session, config.gateway.poll_interval_s)
        loader = Loader(fleet, catalogue, session, poller, metrics, config.gateway.load_timeout_s)
        placer = Placer(config, catalogue, fleet, poller, loader, metrics)
        dispatcher = Dispatcher(config, fleet, session, poller, placer)
        keeper = Housekeeper(config.eviction, catalogue, fleet, loader, placer)
        background = [
            asyncio.create_task(poller.run(), name="poller"),
            asyncio.create_task(keeper.run(), name="housekeeper"),
        ]
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(poller.first_round(), FIRST_POLL_S)
            yield Gateway(
                *(config, catalogue, fleet, metrics, poller, loader, dispatcher, Relays()),
                *(Keys(config), Ledger(), store),
            )
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await loader.close()
            await store.close()


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

    return aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0, socket_factory=socket_of)
