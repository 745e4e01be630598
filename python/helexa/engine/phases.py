"""How long each part of a load takes, for the log; parts may overlap."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Phases:
    """Seconds by the name of a part; any thread may add to them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time that the block takes, also if it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def timed(self, name: str, work: Callable[[], T]) -> T:
        """What `work` returns."""
        with self(name):
            return work()

    def fields(self) -> dict[str, float]:
        """For a line of the log, to the millisecond."""
        return {f"{name}_s": round(seconds, 3) for name, seconds in self.seconds.items()}
