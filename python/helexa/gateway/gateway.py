"""The parts of a running gateway, put together."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import aiohttp

from helexa.gateway.auth import Keys
from helexa.gateway.catalogue import Catalogue
from helexa.gateway.config import GatewayConfig, NeuronEntry
from helexa.gateway.fleet import Fleet, Node
from helexa.gateway.housekeeper import Housekeeper
from helexa.gateway.loader import Loader
from helexa.gateway.metrics import Metrics
from helexa.gateway.placer import Placer
from helexa.gateway.poller import Poller
from helexa.gateway.proxy import Relays
from helexa.gateway.quota import Ledger
from helexa.gateway.site import Site
from helexa.gateway.store import ResponseStore
from helexa.gateway.upstream import Dispatcher
from helexa.serving import client_tls, end_when_gone

FIRST_POLL_S = 2.0
GONE_S = 30  # without a word from the machine of a neuron


class Gateway:
    """The parts that the routes share, alive within `running`; after `reconfigure` most are others."""

    def __init__(
        self,
        config: GatewayConfig,
        catalogue: Catalogue,
        session: aiohttp.ClientSession,
        control: aiohttp.ClientSession,
    ):
        self.fleet = Fleet(_nodes(config, {}))
        self.metrics = Metrics(self.fleet)
        loop = asyncio.get_running_loop()
        self.metrics.tasks.set_function(lambda: len(asyncio.all_tasks(loop)))
        self.relays = Relays()
        self.keys = Keys(config)
        self.ledger = Ledger()
        self.store = ResponseStore(config.store)
        self._session = session
        self._control = control
        self._background: list[asyncio.Task[None]] = []
        self._assemble(config, catalogue)

    async def reconfigure(self, config: GatewayConfig, catalogue: Catalogue) -> None:
        """Serves by another configuration; requests under way end as they began.

        What is known of neurons that stay as they are is kept. Raises ConfigError and changes nothing.
        """
        known = {entry: self.fleet.nodes[entry.name] for entry in _entries(self.config)}
        nodes = _nodes(config, known)
        self.keys.configure(config)
        self.ledger.forget_others(self.keys.principals)
        former, background = self.loader, self._background
        gone = [node for name, node in self.fleet.nodes.items() if nodes.get(name) is not node]
        self.fleet.nodes.clear()  # all is changed before anything is awaited: nobody sees half of it
        self.fleet.nodes.update(nodes)
        self._assemble(config, catalogue)
        self.loader.adopt(former)
        await former.abandon(gone)
        await _end(background)

    async def close(self) -> None:
        """Stops what goes on by itself; the neurons go on."""
        await _end(self._background)
        await self.loader.close()
        await self.store.close()

    def _assemble(self, config: GatewayConfig, catalogue: Catalogue) -> None:
        self.config, self.catalogue = config, catalogue
        site = Site(config, catalogue, self.fleet, self.metrics)
        self.poller = poller = Poller(site, self._control)
        self.loader = Loader(site, self._control, poller)
        placer = Placer(site, poller, self.loader)
        self.dispatcher = Dispatcher(site, self._session, poller, placer)
        keeper = Housekeeper(site, self.loader, placer)
        self._background = [
            asyncio.create_task(poller.run(), name="poller"),
            asyncio.create_task(keeper.run(), name="housekeeper"),
        ]


@asynccontextmanager
async def running(config: GatewayConfig, catalogue: Catalogue) -> AsyncIterator[Gateway]:
    """A gateway whose neurons have been asked once and are polled until the end."""
    # Polls have connections of their own: they would keep those alive that many requests at once have left.
    async with _session() as session, _session() as control:
        gateway = Gateway(config, catalogue, session, control)
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(gateway.poller.first_round(), FIRST_POLL_S)
            yield gateway
        finally:
            await gateway.close()


def _entries(config: GatewayConfig) -> list[NeuronEntry]:
    secret = config.auth.neuron_secret
    return [
        replace(entry, secret=entry.secret or secret) if entry.kind == "neuron" else entry
        for entry in config.neurons
    ]


def _nodes(config: GatewayConfig, known: Mapping[NeuronEntry, Node]) -> dict[str, Node]:
    """A node for each neuron: the known one where its entry is unchanged. Raises ConfigError."""
    nodes = {entry.name: (known.get(entry) or _node(entry), _trust(entry)) for entry in _entries(config)}
    for node, trust in nodes.values():
        node.ssl = trust  # the files may be new
    return {name: node for name, (node, _) in nodes.items()}


def _node(entry: NeuronEntry) -> Node:
    token = entry.secret or entry.key
    headers = {"authorization": f"Bearer {token}"} if token else {}
    endpoint = entry.endpoint.rstrip("/")
    if entry.kind == "openai":
        endpoint = endpoint.removesuffix("/v1")  # as it is often written
    return Node(entry.name, endpoint, headers, kind=entry.kind, offers=entry.models)


def _trust(entry: NeuronEntry) -> ssl.SSLContext | bool:
    if entry.tls_ca or entry.tls_cert:
        return client_tls(entry.tls_ca, entry.tls_cert, entry.tls_key)
    return True


async def _end(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=_connector(), auto_decompress=False)


def _connector() -> aiohttp.TCPConnector:
    """No limit on connections: a neuron's queue decides. A host that vanished is noticed in half a minute."""

    def socket_of(address: Any) -> socket.socket:
        family, kind, protocol, _, _ = address
        made = socket.socket(family, kind, protocol)
        end_when_gone(made, GONE_S)
        return made

    return aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0, socket_factory=socket_of)
