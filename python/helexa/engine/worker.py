"""One thread that owns a device: jobs go in through one queue, plain values come out.

A job that raises a HelexaError fails alone. Anything else is taken for a fault of the device, whose state
nobody can vouch for any more: the worker is poisoned, answers every later job with DevicePoisoned at once,
and stays so until it is closed.
"""

import logging
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from helexa.errors import DevicePoisoned, HelexaError, ShuttingDown
from helexa.log import fields

logger = logging.getLogger(__name__)
T = TypeVar("T")


def is_fault(error: Exception) -> bool:
    """Whether the error leaves the device in a state that nobody knows."""
    return not isinstance(error, HelexaError) or isinstance(error, DevicePoisoned)


class DeviceWorker:
    """Runs jobs one after the other on its own thread; `poisoned` says what broke it, if anything did."""

    def __init__(self, name: str, on_fault: Callable[[DevicePoisoned], None] | None = None):
        self.name = name
        self.poisoned: str | None = None
        self._on_fault = on_fault
        self._queue: SimpleQueue[tuple[Callable[[], Any], Future[Any] | None] | None] = SimpleQueue()
        self._gate = threading.Lock()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, job: Callable[[], object]) -> None:
        """Queues a job whose result nobody waits for; raises DevicePoisoned or ShuttingDown at once."""
        self._put(job, None)

    def call(self, job: Callable[[], T]) -> "Future[T]":
        """Queues a job; the future holds what it returns or raises."""
        future: Future[T] = Future()
        self._put(job, future)
        return future

    def give_up(self, reason: str) -> None:
        """Poisons the worker while its thread hangs in a job; what is queued fails, and all that comes later.

        Called on another thread.
        """
        if self.poisoned is not None:
            return
        logger.error("worker_hangs", extra=fields(worker=self.name, reason=reason))
        self._poison(reason)
        while True:
            try:
                entry = self._queue.get_nowait()
            except Empty:
                return
            if entry is None:
                self._queue.put(None)
                return
            _, future = entry
            if future is not None and future.set_running_or_notify_cancel():
                future.set_exception(self._poison_error())

    def close(self, timeout_s: float = 10.0) -> bool:
        """Runs what is queued, refuses what is new, ends the thread; False if it is busy after timeout_s."""
        with self._gate:
            if not self._is_closing:
                self._is_closing = True
                self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.error("worker_stuck", extra=fields(worker=self.name, waited_s=timeout_s))
        return not self._thread.is_alive()

    def _put(self, job: Callable[[], Any], future: "Future[Any] | None") -> None:
        with self._gate:
            if self.poisoned is not None:
                raise self._poison_error()
            if self._is_closing:
                raise ShuttingDown(f"the worker {self.name} is shutting down")
            self._queue.put((job, future))

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            self._serve(*entry)
            del entry  # a finished job must not keep its tensors alive while the thread waits

    def _serve(self, job: Callable[[], Any], future: "Future[Any] | None") -> None:
        if future is not None and not future.set_running_or_notify_cancel():
            return
        try:
            if self.poisoned is not None:
                raise self._poison_error()
            result = job()
        except Exception as error:
            if is_fault(error) and self.poisoned is None:
                logger.exception("device_poisoned", extra=fields(worker=self.name))
                self._poison(f"{type(error).__name__}: {error}")
                error = self._poison_error()
            _forget_locals(error)
            if future is not None:
                future.set_exception(error)
            elif self.poisoned is None:
                logger.exception("job_failed", extra=fields(worker=self.name))
        else:
            if future is not None:
                future.set_result(result)

    def _poison(self, reason: str) -> None:
        with self._gate:
            self.poisoned = reason
        if self._on_fault is not None:
            try:
                self._on_fault(self._poison_error())
            except Exception:
                logger.exception("fault_report_failed", extra=fields(worker=self.name))

    def _poison_error(self) -> DevicePoisoned:
        return DevicePoisoned(f"{self.name} failed and must be loaded again: {self.poisoned}")


def _forget_locals(error: BaseException | None) -> None:
    """Clears the frames that the error remembers: they hold tensors, which must not leave the thread."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
