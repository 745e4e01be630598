"""Loads and unloads on neurons: one load per model at a time, however many requests wait for it."""

import asyncio
import logging
import time
from collections.abc import Iterable

import aiohttp
import msgspec

from helexa.errors import CannotHost, HelexaError, Unavailable
from helexa.gateway.fleet import Node
from helexa.gateway.poller import Poller, reason
from helexa.gateway.router import Decision
from helexa.gateway.site import Site
from helexa.log import fields
from helexa.wire.control import LoadRequest, UnloadRequest
from helexa.wire.errors import parse_error

logger = logging.getLogger(__name__)

FAILURE_MEMORY_S = 10.0
EVICTION_DRAIN_S = 30.0


class Loader:
    """Carries out the router's decisions that are more than serving."""

    def __init__(self, site: Site, session: aiohttp.ClientSession, poller: Poller):
        self._fleet = site.fleet
        self._catalogue = site.catalogue
        self._metrics = site.metrics
        self._session = session
        self._poller = poller
        self._timeout = aiohttp.ClientTimeout(total=site.config.gateway.load_timeout_s)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def begin(self, decision: Decision) -> asyncio.Task[None]:
        """The load of the model, begun now unless it was under way."""
        task = self._tasks.get(decision.model)
        if task is None:
            # The fleet shows the plan before anything is awaited: no other request plans with the same room.
            node = self._fleet.nodes[decision.node]
            self._fleet.loading[decision.model] = decision.node
            if decision.action == "recover":
                self._fleet.recovering.add(decision.model)
            for victim in decision.evict:
                if info := node.models.pop(victim, None):
                    node.displaced[victim] = info
            task = asyncio.create_task(self._load(node, decision), name=f"load {decision.model}")
            self._tasks[decision.model] = task
            task.add_done_callback(lambda done: self._ended(decision.model, done))
        return task

    def adopt(self, former: "Loader") -> None:
        """Takes over the loads that another loader of the same fleet has begun."""
        self._tasks = former._tasks

    async def close(self) -> None:
        """Stops waiting for loads; the neurons go on with them."""
        await self.abandon(self._fleet.nodes.values())

    async def abandon(self, nodes: Iterable[Node]) -> None:
        """Stops waiting for loads on these nodes."""
        names = {node.name for node in nodes}
        tasks = [task for model, task in self._tasks.items() if self._fleet.loading[model] in names]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, model: str, task: asyncio.Task[None]) -> None:
        del self._tasks[model]
        del self._fleet.loading[model]
        self._fleet.recovering.discard(model)
        if not task.cancelled():
            task.exception()  # retrieved, also when every client has left
        self._poller.notify()

    async def _load(self, node: Node, decision: Decision) -> None:
        model, started = decision.model, time.perf_counter()
        logger.info(
            "load_started", extra=fields(model=model, node=node.name, evict=",".join(decision.evict) or None)
        )
        outcome = "cancelled"
        try:
            if decision.evict:
                self._metrics.swaps.labels(model, node.name).inc()
            for victim in decision.evict:
                await self._unload(node, victim, "room")
            await self._post(node, "/models/load", self._request(node, decision))
            if not await self._poller.poll(node) or not node.is_loaded(model):
                raise Unavailable(f"{node.name} loaded model {model!r} but does not show it")
            outcome = "loaded"
        except HelexaError as error:
            outcome = "failed"
            self._remember(node, model, error)
            logger.warning("load_failed", extra=fields(model=model, node=node.name, error=error.message))
            await self._poller.poll(node)
            raise
        finally:
            seconds = time.perf_counter() - started
            self._metrics.loads.labels(model, node.name, outcome).inc()
        self._metrics.load_time.labels(model, node.name).observe(seconds)
        node.load_seconds[model] = seconds
        logger.info("load_finished", extra=fields(model=model, node=node.name, seconds=seconds))

    def _request(self, node: Node, decision: Decision) -> LoadRequest:
        """What the catalogue says; else what the neuron knows, or knew when the model had to leave."""
        entry = self._catalogue.models.get(decision.model)
        if decision.action == "load" and entry is not None:
            return entry.load_request()
        before = node.displaced.get(decision.model) if decision.action == "load" else None
        return LoadRequest(model_id=decision.model, source=before.source if before else None, wait=True)

    def _remember(self, node: Node, model: str, error: HelexaError) -> None:
        """Keeps the router from trying the same again and again."""
        key = (node.name, model)
        self._fleet.failed[key] = error
        asyncio.get_running_loop().call_later(FAILURE_MEMORY_S, self._fleet.failed.pop, key, None)

    async def retire(self, node: Node, model: str) -> None:
        """Unloads a model that nobody has asked for in a long time."""
        node.models.pop(model, None)  # before anything is awaited: no request goes there any more
        await self._unload(node, model, "idle")
        await self._poller.poll(node)

    async def defragment(self, node: Node) -> None:
        """Has the neuron give back what it holds beyond its models, by loading these anew."""
        node.unloads = 0
        await self._post(node, "/defrag", None)
        self._metrics.defrags.labels(node.name).inc()
        await self._poller.poll(node)

    async def _unload(self, node: Node, model: str, why: str) -> None:
        request = UnloadRequest(model_id=model, drain_s=EVICTION_DRAIN_S)
        await self._post(node, "/models/unload", request, gone_is_fine=True)
        node.unloads += 1
        self._metrics.evictions.labels(model, node.name, why).inc()
        logger.info("evicted", extra=fields(model=model, node=node.name, why=why))

    async def _post(
        self, node: Node, path: str, request: msgspec.Struct | None, *, gone_is_fine: bool = False
    ) -> None:
        status, body = await self._exchange(node, path, request)
        if status < 300 or (status == 404 and gone_is_fine):
            return
        raise _refusal(node, path, status, body)

    async def ask(self, node: Node, path: str, request: msgspec.Struct) -> tuple[int, bytes]:
        """Status and body of the neuron's answer. Raises its error as it is, Unavailable if there is none."""
        status, body = await self._exchange(node, path, request)
        if status >= 300:
            raise parse_error(status, body)
        return status, body

    async def _exchange(self, node: Node, path: str, request: msgspec.Struct | None) -> tuple[int, bytes]:
        headers = {"content-type": "application/json", **node.headers}
        try:
            async with self._session.post(
                node.endpoint + path,
                data=b"{}" if request is None else msgspec.json.encode(request),
                headers=headers,
                ssl=node.ssl,
                timeout=self._timeout,
            ) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            self._poller.suspect(node)
            raise Unavailable(f"{node.name} did not carry out {path}: {reason(error)}") from error


def _refusal(node: Node, path: str, status: int, body: bytes) -> HelexaError:
    """The neuron's own words; a 4xx will not change by itself, so the client is not invited to try again."""
    kind = CannotHost if status < 500 else Unavailable
    return kind(f"{node.name} refused {path}: {parse_error(status, body).message}")
