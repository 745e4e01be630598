"""Notices a step that does not end: a kernel that hangs, a device that has fallen off the bus.

The thread that waits for the device cannot say so. Another one looks at the clock, and poisons the worker
in its place, so that requests end with an error instead of waiting for ever.
"""

import threading
import time
from collections.abc import Callable

from helexa.engine.worker import DeviceWorker


class Watchdog:
    """Gives a worker up when what it is at has been under way for more than limit_s.

    started_s: when the present step began, by time.monotonic; None between two steps.
    """

    def __init__(self, worker: DeviceWorker, started_s: Callable[[], float | None], limit_s: float):
        self._worker = worker
        self._started_s = started_s
        self._limit_s = limit_s
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name=f"watchdog {worker.name}", daemon=True).start()

    def close(self) -> None:
        """Looks no more."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._limit_s / 4)):
            started_s = self._started_s()
            if started_s is not None and time.monotonic() - started_s > self._limit_s:
                self._worker.give_up(f"a step has not ended within {self._limit_s:g} s")
                return
