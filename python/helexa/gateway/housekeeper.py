"""What the gateway does unasked: unloads what nobody uses, has memory given back, ends stale claims."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterator
from typing import Any

from helexa.errors import HelexaError
from helexa.gateway.fleet import Node
from helexa.gateway.loader import Loader
from helexa.gateway.placer import Placer
from helexa.gateway.site import Site
from helexa.log import fields

logger = logging.getLogger(__name__)

ROUND_S = 1.0


class Housekeeper:
    """One round a second over the whole fleet."""

    def __init__(self, site: Site, loader: Loader, placer: Placer):
        self._eviction = site.config.eviction
        self._catalogue = site.catalogue
        self._fleet = site.fleet
        self._loader = loader
        self._placer = placer
        self._started = time.monotonic()
        self._errands: dict[str, asyncio.Task[None]] = {}  # by node: one at a time

    async def run(self) -> None:
        """Goes on until cancelled; what is under way on a neuron then ends there by itself."""
        try:
            while True:
                await asyncio.sleep(ROUND_S)
                try:
                    self.round(time.monotonic())
                except Exception:
                    logger.exception("housekeeping_failed")
        finally:
            for errand in self._errands.values():
                errand.cancel()
            await asyncio.gather(*self._errands.values(), return_exceptions=True)

    def round(self, now: float) -> None:
        """One look at everything; what takes time goes on by itself."""
        self._placer.pursue(now)
        for node in self._fleet.routable():
            if node.kind != "neuron" or node.name in self._errands:
                continue
            if idle := next(self._idle(node, now), None):
                self._send(node, f"retire {idle}", self._loader.retire(node, idle))
            elif self._is_due_for_defrag(node):
                self._send(node, "defragment", self._loader.defragment(node))

    def _idle(self, node: Node, now: float) -> Iterator[str]:
        """The models on the node that have outlived their time without a request."""
        for model in node.models:
            ttl_s = self._ttl_s(model)
            since = max(self._started, node.loaded_since.get(model, 0.0), node.last_used.get(model, 0.0))
            if ttl_s and node.is_loaded(model) and not node.busy(model) and now - since >= ttl_s:
                yield model

    def _ttl_s(self, model: str) -> float:
        """Only models that the catalogue could bring back leave; pinned ones only if it says so itself."""
        entry = self._catalogue.models.get(model)
        if entry is None:
            return 0.0
        if entry.idle_ttl_s is not None:
            return entry.idle_ttl_s
        return 0.0 if entry.pinned_on else self._eviction.idle_ttl_s

    def _is_due_for_defrag(self, node: Node) -> bool:
        """Counts unloads; looks at the memory after enough of them, once nobody is at work there."""
        limit = self._eviction.defrag_after_cycles
        if not limit or node.unloads < limit or node.health is None:
            return False
        at_work = any(node.busy(model) for model in node.models)
        coming = node.name in self._fleet.loading.values()
        claimed = any(claim.node == node.name for claim in self._fleet.claims.values())
        if at_work or coming or claimed:
            return False
        if node.health.unaccounted_bytes >= self._eviction.defrag_min_mb * 2**20:
            return True
        node.unloads = 0
        return False

    def _send(self, node: Node, name: str, errand: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(errand, name=name)
        self._errands[node.name] = task
        task.add_done_callback(lambda done: self._ended(node, done))

    def _ended(self, node: Node, task: asyncio.Task[None]) -> None:
        del self._errands[node.name]
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, HelexaError):
            logger.warning(
                "errand_failed", extra=fields(errand=task.get_name(), node=node.name, error=error.message)
            )
        elif error is not None:
            logger.error(
                "errand_crashed", exc_info=error, extra=fields(errand=task.get_name(), node=node.name)
            )
