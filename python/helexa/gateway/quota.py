"""What a key may use in a rolling window of time, counted in memory and exact under concurrency.

A request takes its share when it begins: one of the requests, and a reservation of the tokens that it may
need. When it ends, however it ends, the tokens that it used take the reservation's place. So those that run
at the same time cannot all spend what is left: only one at a time may go beyond, by its own answer.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable

from helexa.errors import QuotaExceeded
from helexa.gateway.auth import Principal
from helexa.gateway.keys import Limit

_STEPS = 60  # of a window: what is used within a step leaves the window when the whole step has
_RESERVED_RETRY_S = 2.0  # for what is in the way and may end at any time


class Window:
    """How much was used within the last `window_s`, and how much is reserved by what runs."""

    def __init__(self, window_s: float):
        self.reserved = 0
        self._step_s = window_s / _STEPS
        self._steps: deque[tuple[int, int]] = deque()  # number of the step, amount
        self._used = 0

    def used(self, now: float) -> int:
        """What was used and has not left the window."""
        first = int(now / self._step_s) - _STEPS
        while self._steps and self._steps[0][0] < first:
            self._used -= self._steps.popleft()[1]
        return self._used

    def add(self, now: float, amount: int) -> None:
        """Counts what is used now."""
        step = int(now / self._step_s)
        if self._steps and self._steps[-1][0] == step:
            amount_before = self._steps.pop()[1]
            self._steps.append((step, amount_before + amount))
        else:
            self._steps.append((step, amount))
        self._used += amount

    def seconds_until_below(self, now: float, limit: int) -> float:
        """When less than `limit` is used, if nothing is added; 0 if that is so now."""
        left = self.used(now)
        for step, amount in self._steps:
            if left < limit:
                break
            left -= amount
            until = (step + _STEPS + 1) * self._step_s
            if left < limit:
                return until - now
        return 0.0


class Charge:
    """What one request has taken. `settle` must be called once it has ended."""

    def __init__(self, windows: list[Window], tokens: int, clock: Callable[[], float]):
        self._windows = windows
        self._tokens = tokens
        self._clock = clock
        for window in windows:
            window.reserved += tokens

    def settle(self, tokens: int) -> None:
        """Gives the reservation back and counts the tokens instead; a second call does nothing."""
        now = self._clock()
        while self._windows:
            window = self._windows.pop()
            window.reserved -= self._tokens
            window.add(now, tokens)


class Ledger:
    """The windows of all keys. They live as long as the process, also when the keys file is read again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._windows: dict[tuple[str, str, int], Window] = {}

    def charge(self, principal: Principal, tokens: int) -> Charge:
        """Takes a request and a reservation of `tokens`. Raises QuotaExceeded and takes nothing."""
        if not principal.limits:
            return Charge([], 0, self._clock)
        now = self._clock()
        windows = [(limit, self._window(principal, limit)) for limit in principal.limits]
        waits = [(_wait_s(window, limit, tokens, now), limit) for limit, window in windows]
        wait_s, limit = max(waits, key=lambda wait: wait[0])
        if wait_s > 0:
            raise QuotaExceeded(f"this API key may use {limit}, which it has used up", retry_after_s=wait_s)
        for limit, window in windows:
            if limit.unit == "requests":
                window.add(now, 1)
        return Charge([window for limit, window in windows if limit.unit == "tokens"], tokens, self._clock)

    def used(self, principal: Principal) -> list[tuple[Limit, int]]:
        """Each limit of the key with what counts against it now."""
        now = self._clock()
        return [(limit, self._window(principal, limit).used(now)) for limit in principal.limits]

    def forget_others(self, principals: Iterable[Principal]) -> None:
        """Drops what was counted for keys that are no more."""
        known = {principal.id for principal in principals}
        self._windows = {key: window for key, window in self._windows.items() if key[0] in known}

    def _window(self, principal: Principal, limit: Limit) -> Window:
        key = (principal.id, limit.unit, limit.window_s)
        if key not in self._windows:
            self._windows[key] = Window(limit.window_s)
        return self._windows[key]


def _wait_s(window: Window, limit: Limit, tokens: int, now: float) -> float:
    """How long the limit keeps a request waiting; 0 if it may begin."""
    if window.used(now) >= limit.amount:
        return window.seconds_until_below(now, limit.amount)
    if (
        limit.unit == "tokens"
        and window.reserved
        and window.used(now) + window.reserved + tokens > limit.amount
    ):
        return _RESERVED_RETRY_S
    return 0.0
