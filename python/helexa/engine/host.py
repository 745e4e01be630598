"""A model on its device thread: how it is started, given work, watched and ended."""

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import numpy as np
import torch

from helexa import ops
from helexa.engine.build import build_core
from helexa.engine.core import EngineCore
from helexa.engine.device import Device
from helexa.engine.memory import allocation_errors, release
from helexa.engine.options import EngineOptions, EngineStats
from helexa.engine.phases import Phases
from helexa.engine.sequence import Finished, Receiver, Sequence
from helexa.engine.state_store import StateStore
from helexa.engine.stream import LoopMailbox
from helexa.engine.watchdog import Watchdog
from helexa.engine.weight_keeper import WeightKeeper
from helexa.engine.worker import DeviceWorker
from helexa.errors import DevicePoisoned, HelexaError, ShuttingDown
from helexa.models import Model, ModelConfig

CLOSE_S = 10.0  # how long closing waits for the step under way
SAVE_S = 30.0  # and how long it may take to save what the caches hold
PARK_S = 30.0  # and to park the weights
SWITCH_S = 0.0005  # seconds after which a thread gives up the interpreter to one that waits for it


class Host:
    """Owns worker and core. Its methods may be called on any thread; only `close` waits for the device."""

    def __init__(
        self,
        name: str,
        build: Callable[[], Model],
        config: ModelConfig,
        options: EngineOptions,
        device: Device,
        *,
        store: StateStore | None,
        model_key: str,
        keeper: WeightKeeper,
        phases: Phases,
    ):
        """Calls `build` on the device thread and returns when the model is ready."""
        self.is_closing = False
        self.core: EngineCore | None = None
        self.max_context = config.max_position_embeddings
        self.cache_bytes = 0  # for keys, values and states; main memory is committed as it is written
        self._name = name
        self._device = device
        self._keeper = keeper
        self._lock = threading.Lock()
        self._mailboxes: dict[asyncio.AbstractEventLoop, LoopMailbox] = {}
        self.worker = DeviceWorker(_worker_name(device), self._on_fault)
        try:
            start = partial(self._start, build, config, options, store, model_key, phases)
            self.core = self.worker.call(start).result()
        except BaseException:
            self._end_worker()
            raise
        self._watchdog = Watchdog(self.worker, self._step_started_s, options.step_limit_s)

    def submit(self, sequence: Sequence, receiver: Receiver) -> None:
        """Queues the sequence; the receiver hears why, if that cannot be.

        Raises ShuttingDown or DevicePoisoned.
        """
        if self.is_closing or self.core is None:
            raise ShuttingDown(f"the model {self._name} is being unloaded")
        job = self.worker.call(partial(self.core.submit, sequence))
        job.add_done_callback(partial(_report, receiver))

    def cancel(self, sequence: Sequence) -> None:
        """Has the sequence forgotten before the next step."""
        if self.core is not None:
            with contextlib.suppress(HelexaError):  # closed or poisoned: it has ended already
                self.worker.post(partial(self.core.cancel, sequence))

    def mailbox(self, loop: asyncio.AbstractEventLoop) -> LoopMailbox:
        """Where events for receivers on the loop go."""
        with self._lock:
            for other in [other for other in self._mailboxes if other.is_closed()]:
                del self._mailboxes[other]
            return self._mailboxes.setdefault(loop, LoopMailbox(loop))

    def stats(self) -> EngineStats:
        """Counters as they stand."""
        core = self.core
        assert core is not None
        holdings = core.scheduler.holdings
        snapshots = holdings.snapshots
        return EngineStats(
            in_flight=len(core.scheduler.running),
            queued=len(core.scheduler.waiting),
            kv_tokens_total=core.pool.num_pages * core.pool.page_tokens,
            kv_tokens_used=core.pool.num_used * core.pool.page_tokens,
            kv_tokens_cached=core.pool.num_cached * core.pool.page_tokens,
            prefill_tok_s=core.prefill_rate.tokens_per_s,
            decode_tok_s=core.decode_rate.tokens_per_s,
            prefill_tokens=core.prefill_rate.total_tokens,
            decode_tokens=core.decode_rate.total_tokens,
            cached_tokens=holdings.num_cached_tokens,
            stored_tokens=holdings.num_stored_tokens,
            snapshots_used=0 if snapshots is None else snapshots.num_kept,
            snapshots_total=0 if snapshots is None else snapshots.num_slots,
            preemptions=core.scheduler.num_preemptions,
            poisoned=self.worker.poisoned,
        )

    def close(self, drain_s: float) -> None:
        """Refuses new work, lets what runs go on for drain_s, ends the rest and frees the memory."""
        self.is_closing = True
        core = self.core
        deadline_s = time.monotonic() + drain_s
        while (
            core is not None
            and core.is_busy
            and self.worker.poisoned is None
            and time.monotonic() < deadline_s
        ):
            time.sleep(0.01)
        if core is not None:
            # Closed before or poisoned, nothing runs any more; a step that hangs must not hold up the exit.
            with contextlib.suppress(HelexaError, TimeoutError):
                self.worker.call(core.stop).result(CLOSE_S)
                self.worker.call(partial(core.save, time.monotonic() + SAVE_S)).result(SAVE_S + CLOSE_S)
                self.worker.call(self._keeper.park).result(PARK_S)
            with contextlib.suppress(HelexaError, TimeoutError):
                self.worker.call(core.close).result(CLOSE_S)
        self._watchdog.close()
        self._end_worker()

    @allocation_errors()
    def _start(
        self,
        build: Callable[[], Model],
        config: ModelConfig,
        options: EngineOptions,
        store: StateStore | None,
        model_key: str,
        phases: Phases,
    ) -> EngineCore:
        with phases("device"):
            self._device.enter()
        torch.set_grad_enabled(False)
        # The kernels bring their own threads; torch's few small operations run faster without waking others.
        torch.set_num_threads(1)
        ops.set_num_threads(options.num_threads or 0)
        # glibc keeps free memory up to the size of the largest block that it saw freed, within 32 MB.
        # Sampling takes and frees a few megabytes a token; new pages each time would double what it costs.
        np.empty(30 << 20, np.uint8)
        if self._device.has_streams:
            # Between two steps this thread needs the interpreter for a tenth of a millisecond; by default it
            # would wait 5 ms for others to give it up.
            sys.setswitchinterval(SWITCH_S)
        core = build_core(build(), config, options, self.worker.post, store, model_key, phases)
        assert core.runner is not None
        self.max_context = core.scheduler.max_context
        self.cache_bytes = core.runner.cache.nbytes + core.runner.states.nbytes
        return core

    def _end_worker(self) -> None:
        """Ends the device thread and gives the memory back."""
        has_ended = self.worker.close(CLOSE_S)
        if self.core is not None:
            self.core.forget()
        self._keeper.forget()
        # A device gives nothing back before it has done its work: what hangs there would be waited for.
        if self._device.has_streams and has_ended:
            release()

    def _step_started_s(self) -> float | None:
        return None if self.core is None else self.core.step_started_s

    def _on_fault(self, error: DevicePoisoned) -> None:
        if self.core is not None:
            self.core.fail_all(error)


def _worker_name(device: Device) -> str:
    return device.name.replace(":", "-") if ":" in device.name else f"{device.name}-0"


def _report(receiver: Receiver, job: "Future[None]") -> None:
    """Tells the receiver why its sequence never reached the scheduler, if so."""
    error = job.exception()
    if isinstance(error, HelexaError):
        event = Finished("error", error)
        if receiver.mailbox is None:
            receiver.receive(event)
        else:
            receiver.mailbox.post([(receiver, event)])
