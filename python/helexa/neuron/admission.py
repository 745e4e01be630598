"""Who may run on a model now, who waits, and who is sent away with the time to come back.

First come, first served over a fixed number of seats, with a bounded queue. A waiter that is cancelled, its
client being gone, leaves at once. Everything happens on the event loop, so there is no lock.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from helexa.errors import HelexaError, Overloaded

_MEMORY = 0.2  # share of the newest request in the mean time that a seat is held
_FIRST_GUESS_S = 5.0  # that mean before any request has ended


class _Waiter:
    def __init__(self, seats: int):
        self.seats = seats
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Admission:
    """Seats of one model. `close` refuses everybody from then on; those who run keep their seats."""

    def __init__(self, max_in_flight: int, max_queue_depth: int, max_wait_s: float):
        self.max_in_flight = max_in_flight
        self.max_queue_depth = max_queue_depth
        self.max_wait_s = max_wait_s
        self.in_flight = 0  # seats taken
        self.rejected_queue_full = 0
        self.rejected_timeout = 0
        self._queue: deque[_Waiter] = deque()
        self._mean_hold_s: float | None = None
        self._closed: HelexaError | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def queue_depth(self) -> int:
        return len(self._queue)

    @asynccontextmanager
    async def seat(self, seats: int = 1) -> AsyncIterator[None]:
        """Waits for `seats` seats, at most all, and holds them. Raises Overloaded or the error of `close`."""
        seats = min(seats, self.max_in_flight)
        await self._acquire(seats)
        started = time.monotonic()
        try:
            yield
        finally:
            held = time.monotonic() - started
            mean = held if self._mean_hold_s is None else self._mean_hold_s
            self._mean_hold_s = mean + _MEMORY * (held - mean)
            self._release(seats)

    def close(self, error: HelexaError) -> None:
        """Refuses new requests and those that wait with `error`."""
        self._closed = error
        while self._queue:
            waiter = self._queue.popleft()
            if not waiter.granted.done():
                waiter.granted.set_exception(error)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Whether every seat was given back within `timeout_s`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return self._idle.is_set()

    def retry_after_s(self, ahead: int) -> float:
        """When someone with `ahead` requests before them can expect a seat, by how long seats are held."""
        mean = _FIRST_GUESS_S if self._mean_hold_s is None else self._mean_hold_s
        return min(max(1.0, mean * (ahead + 1) / self.max_in_flight), 600.0)

    async def _acquire(self, seats: int) -> None:
        if self._closed:
            raise self._closed
        if not self._queue and self.in_flight + seats <= self.max_in_flight:
            self._take(seats)
            return
        if len(self._queue) >= self.max_queue_depth:
            self.rejected_queue_full += 1
            raise Overloaded(
                f"{self.in_flight} seats are taken and {len(self._queue)} requests wait, which is the limit",
                retry_after_s=self.retry_after_s(0),
            )
        waiter = _Waiter(seats)
        self._queue.append(waiter)
        try:
            async with asyncio.timeout(self.max_wait_s):
                await waiter.granted
        except (TimeoutError, asyncio.CancelledError) as reason:
            # The seat may have been granted in the same turn of the loop as the cancellation.
            if (
                waiter.granted.done()
                and not waiter.granted.cancelled()
                and waiter.granted.exception() is None
            ):
                self._release(seats)
            if isinstance(reason, asyncio.CancelledError):
                raise
            self.rejected_timeout += 1
            raise Overloaded(
                f"no seat became free within {self.max_wait_s:g} s",
                retry_after_s=self.retry_after_s(len(self._queue)),
            ) from None
        finally:
            with suppress(ValueError):
                self._queue.remove(waiter)
            self._grant()

    def _take(self, seats: int) -> None:
        self.in_flight += seats
        self._idle.clear()

    def _release(self, seats: int) -> None:
        self.in_flight -= seats
        if not self.in_flight:
            self._idle.set()
        self._grant()

    def _grant(self) -> None:
        while self._queue and self.in_flight + self._queue[0].seats <= self.max_in_flight:
            waiter = self._queue.popleft()
            if not waiter.granted.done():
                self._take(waiter.seats)
                waiter.granted.set_result(None)
