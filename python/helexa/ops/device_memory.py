"""Memory of devices that torch keeps for later; none of it is given back while a graph is captured."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_turn = threading.RLock()


def free_unused() -> None:
    """Gives what torch keeps of all devices back to them; waits for captures of other threads."""
    with _turn:
        torch.cuda.empty_cache()


@contextmanager
def captured(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Captures what the thread queues on its stream; other threads may use devices meanwhile.

    Unlike torch.cuda.graph, it neither collects garbage nor gives free memory back, which takes long.
    """
    with _turn:
        graph.capture_begin(pool, "thread_local")
        try:
            yield
        finally:
            graph.capture_end()
