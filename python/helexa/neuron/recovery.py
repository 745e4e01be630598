"""What happens after a fault of a device, without anybody's help.

A poisoned model is loaded again from what it was loaded from, a few times at most. Where the process has
lost its device for good, as after a kernel that failed, no reload can help: the neuron refuses new work,
says why in /health until gateways have had time to see it, and ends with an exit status of its own, so that
the service manager starts a new one.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable

from helexa.errors import HelexaError
from helexa.log import fields
from helexa.neuron.loaded_model import LoadedModel
from helexa.neuron.metrics import Metrics
from helexa.neuron.registry import Registry

logger = logging.getLogger(__name__)

EXIT_DEVICE_LOST = 75  # EX_TEMPFAIL of sysexits.h: starting again will do
_TRIES = 3  # reloads of one model
_WITHIN_S = 600.0
_ANNOUNCE_S = 3.0  # longer than a gateway waits between two looks


class Recovery:
    """Watches the models of a registry. `is_lost(device)` may take seconds; it runs in a thread."""

    def __init__(
        self,
        registry: Registry,
        metrics: Metrics,
        is_lost: Callable[[str], bool],
        *,
        end: Callable[[int], None] = os._exit,
        announce_s: float = _ANNOUNCE_S,
        look_s: float = 0.5,
    ):
        self._registry = registry
        self._metrics = metrics
        self._is_lost = is_lost
        self._end = end
        self._announce_s = announce_s
        self.look_s = look_s  # between two looks
        self._reloads: dict[str, list[float]] = {}  # when each model was loaded again
        self._given_up: set[LoadedModel] = set()

    async def watch(self) -> None:
        """Looks after the models until it is cancelled."""
        while True:
            for model in self._registry:
                if model.status == "loaded" and model.poisoned and model not in self._given_up:
                    try:
                        await self._recover(model)
                    except Exception:  # the next look tries again
                        logger.exception("recovery_failed", extra=fields(model=model.id))
            await asyncio.sleep(self.look_s)

    async def _recover(self, model: LoadedModel) -> None:
        engine, reason = model.engine, model.poisoned
        if engine is None or reason is None:
            return
        device = engine.options.device
        self._metrics.faults.labels(device).inc()
        if await asyncio.to_thread(self._is_lost, device):
            await self._restart(device, reason)
            return
        now_s = time.monotonic()
        before = [at_s for at_s in self._reloads.get(model.id, []) if now_s - at_s < _WITHIN_S]
        if len(before) >= _TRIES:
            self._given_up.add(model)
            logger.error(
                "recovery_given_up", extra=fields(model=model.id, reloads=len(before), reason=reason)
            )
            return
        self._reloads[model.id] = [*before, now_s]
        logger.warning("recovery_reload", extra=fields(model=model.id, device=device, reason=reason))
        try:
            self._registry.reload(model)
        except HelexaError as error:  # the neuron is shutting down
            logger.warning("recovery_refused", extra=fields(model=model.id, error=error.message))

    async def _restart(self, device: str, reason: str) -> None:
        message = f"the device {device} is lost to this process, which starts anew: {reason}"
        logger.critical("device_lost", extra=fields(device=device, reason=reason, exit=EXIT_DEVICE_LOST))
        self._registry.refuse(message)
        await asyncio.sleep(self._announce_s)
        self._end(EXIT_DEVICE_LOST)
