"""Threads for what texts cost: templates, tokenizing, grammars. Few, as the engine needs the cores."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from helexa.errors import Overloaded

T = TypeVar("T")
_THREADS = 2
_MAX_PENDING = 256  # requests whose texts wait for a thread; each holds its body
_RETRY_AFTER_S = 1.0


class TextWork:
    """Runs work beside the event loop, and refuses it when too much is waiting."""

    def __init__(self, max_pending: int = _MAX_PENDING):
        self.max_pending = max_pending
        self.num_pending = 0
        self._threads = ThreadPoolExecutor(_THREADS, "text")

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """What `work` returns. Raises Overloaded at once, without running it, when the line is full."""
        if self.num_pending >= self.max_pending:
            raise Overloaded(
                f"{self.num_pending} requests wait for their texts to be tokenized, which is the limit",
                retry_after_s=_RETRY_AFTER_S,
            )
        self.num_pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        finally:
            self.num_pending -= 1

    def close(self) -> None:
        """Lets go of the threads; work that has not begun is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
