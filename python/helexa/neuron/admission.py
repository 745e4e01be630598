"""Who may run on a model now, who waits, and who is sent away with the time to come back.

A request needs room for its tokens in the KV cache and a seat, and gets both at once or waits for both. Among
those that wait the highest priority is next, then who holds the fewest seats, then who came first; nobody
overtakes the next one, however small. The queue is bounded, and so is what one principal may have of it. A
waiter that is cancelled, its client being gone, leaves at once. Everything happens on the event loop, so
there is no lock.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from helexa.errors import HelexaError, Overloaded, PayloadTooLarge, QuotaExceeded

_MEMORY = 0.2  # share of the newest request in the mean time that a seat is held
_FIRST_GUESS_S = 5.0  # that mean before any request has ended


@dataclass(frozen=True)
class _Claim:
    """What one request asks for."""

    seats: int
    kv_tokens: int
    principal: str
    priority: int


class _Waiter:
    def __init__(self, claim: _Claim):
        self.claim = claim
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def refuse(self, error: HelexaError) -> None:
        if not self.granted.done():
            self.granted.set_exception(error)


class Admission:
    """Seats of one model. `close` refuses everybody from then on; those who run keep their seats.

    max_per_principal: requests of one principal that run or wait; by default all seats and three quarters of
    the queue. Those without a name, as on a machine of one's own, have no such limit.   kv_tokens_total: 0 is
    none.
    """

    def __init__(
        self,
        max_in_flight: int,
        max_queue_depth: int,
        max_wait_s: float,
        *,
        max_per_principal: int | None = None,
        kv_tokens_total: int = 0,
    ):
        self.max_in_flight = max_in_flight
        self.max_queue_depth = max_queue_depth
        self.max_wait_s = max_wait_s
        self.max_per_principal = max_per_principal or max_in_flight + (3 * max_queue_depth + 3) // 4
        self.kv_tokens_total = kv_tokens_total
        self.kv_tokens = 0  # that requests with a seat have claimed
        self.in_flight = 0  # seats taken
        self.rejected_queue_full = 0
        self.rejected_timeout = 0
        self.rejected_per_principal = 0
        self._queue: list[_Waiter] = []  # in order of arrival
        self._seats_of: Counter[str] = Counter()  # taken, by principal
        self._requests_of: Counter[str] = Counter()  # running and waiting, by principal
        self._mean_hold_s: float | None = None
        self._closed: HelexaError | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def queue_depth(self) -> int:
        return len(self._queue)

    @asynccontextmanager
    async def seat(
        self, seats: int = 1, *, principal: str = "", priority: int = 0, kv_tokens: int = 0
    ) -> AsyncIterator[None]:
        """Waits for `seats` seats, at most all, and holds them with room for `kv_tokens`.

        Raises PayloadTooLarge for what can never fit, QuotaExceeded where the principal has its share,
        Overloaded when the queue is full or the wait too long, or the error of `close`.
        """
        claim = _Claim(min(seats, self.max_in_flight), kv_tokens, principal, priority)
        self._check(claim)
        self._requests_of[principal] += 1
        try:
            await self._acquire(claim)
            started = time.monotonic()
            try:
                yield
            finally:
                held = time.monotonic() - started
                mean = held if self._mean_hold_s is None else self._mean_hold_s
                self._mean_hold_s = mean + _MEMORY * (held - mean)
                self._release(claim)
        finally:
            _subtract(self._requests_of, principal, 1)

    def check(self, *, principal: str = "", priority: int = 0) -> None:
        """Raises what `seat` would raise now even for the smallest request, before any work on its texts."""
        claim = _Claim(1, 0, principal, priority)
        self._check(claim)
        if self._queue or not self._fits(claim):
            self._displaced(claim)

    def close(self, error: HelexaError) -> None:
        """Refuses new requests and those that wait with `error`."""
        self._closed = error
        while self._queue:
            self._queue.pop().refuse(error)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Whether every seat was given back within `timeout_s`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return self._idle.is_set()

    def retry_after_s(self, ahead: int) -> float:
        """When someone with `ahead` requests before them can expect a seat, by how long seats are held."""
        mean = _FIRST_GUESS_S if self._mean_hold_s is None else self._mean_hold_s
        return min(max(1.0, mean * (ahead + 1) / self.max_in_flight), 600.0)

    def _check(self, claim: _Claim) -> None:
        """Raises what is known before any wait."""
        if self._closed:
            raise self._closed
        if self.kv_tokens_total and claim.kv_tokens > self.kv_tokens_total:
            raise PayloadTooLarge(
                f"the request needs room for {claim.kv_tokens} tokens; "
                f"the KV cache has {self.kv_tokens_total}",
                max=self.kv_tokens_total,
            )
        if claim.principal and self._requests_of[claim.principal] >= self.max_per_principal:
            self.rejected_per_principal += 1
            raise QuotaExceeded(
                f"{self.max_per_principal} requests of this key run or wait, which is its share of the model",
                retry_after_s=self.retry_after_s(0),
            )

    async def _acquire(self, claim: _Claim) -> None:
        if not self._queue and self._fits(claim):
            self._take(claim)
            return
        waiter = self._enqueue(claim)
        self._grant()
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
                self._release(claim)
            if isinstance(reason, asyncio.CancelledError):
                raise
            self.rejected_timeout += 1
            missing = "seat" if self.in_flight + claim.seats > self.max_in_flight else "room in the KV cache"
            raise Overloaded(
                f"no {missing} became free within {self.max_wait_s:g} s",
                retry_after_s=self.retry_after_s(len(self._queue)),
            ) from None
        finally:
            with suppress(ValueError):
                self._queue.remove(waiter)
            self._grant()

    def _enqueue(self, claim: _Claim) -> _Waiter:
        """A place in the queue; where it is full, that of the last of a lower priority. Raises Overloaded."""
        if last := self._displaced(claim):
            self.rejected_queue_full += 1
            self._queue.remove(last)
            retry_s = self.retry_after_s(0)
            last.refuse(Overloaded("requests of a higher priority fill the queue", retry_after_s=retry_s))
        waiter = _Waiter(claim)
        self._queue.append(waiter)
        return waiter

    def _displaced(self, claim: _Claim) -> _Waiter | None:
        """Who would lose their place in the queue to the claim; None while there is room."""
        if len(self._queue) < self.max_queue_depth:
            return None
        last = min(reversed(self._queue), key=lambda other: other.claim.priority, default=None)
        if last is None or last.claim.priority >= claim.priority:
            self.rejected_queue_full += 1
            raise Overloaded(
                f"{self.in_flight} seats are taken and {len(self._queue)} requests wait, which is the limit",
                retry_after_s=self.retry_after_s(0),
            )
        return last

    def _fits(self, claim: _Claim) -> bool:
        has_room = not self.kv_tokens_total or self.kv_tokens + claim.kv_tokens <= self.kv_tokens_total
        return has_room and self.in_flight + claim.seats <= self.max_in_flight

    def _take(self, claim: _Claim) -> None:
        self.in_flight += claim.seats
        self.kv_tokens += claim.kv_tokens
        self._seats_of[claim.principal] += claim.seats
        self._idle.clear()

    def _release(self, claim: _Claim) -> None:
        self.in_flight -= claim.seats
        self.kv_tokens -= claim.kv_tokens
        _subtract(self._seats_of, claim.principal, claim.seats)
        if not self.in_flight:
            self._idle.set()
        self._grant()

    def _grant(self) -> None:
        """Seats those whose turn it is while there is room; the first that does not fit is waited for."""
        while self._queue:
            waiter = min(self._queue, key=self._turn)
            if not self._fits(waiter.claim):
                return
            self._queue.remove(waiter)
            if not waiter.granted.done():
                self._take(waiter.claim)
                waiter.granted.set_result(None)

    def _turn(self, waiter: _Waiter) -> tuple[int, int]:
        return -waiter.claim.priority, self._seats_of[waiter.claim.principal]


def _subtract(counts: Counter[str], name: str, amount: int) -> None:
    """Counts down; names at zero are dropped, as there is no end to names."""
    counts[name] -= amount
    if counts[name] <= 0:
        del counts[name]
