"""Models on this machine, for the commands that run the engine in their own process."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from helexa.errors import HelexaError
from helexa.weights.sources import resolve


def load_engine(path: Path, *, context: int, threads: int | None, kv_dtype: str, device: str = "cpu") -> Any:
    """The engine with the model at `path`, on all CPUs that this process may use unless told otherwise."""
    from helexa.engine.engine import Engine

    return Engine.load(
        path,
        device=device,
        max_context=context,
        num_threads=threads or usable_cpus(),
        kv_dtype=kv_dtype,
        max_sequences=1,
    )


def usable_cpus() -> int:
    """How many CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_model(name: str) -> Path:
    """The file or directory that `name` stands for: a path, or a model in the cache. Raises HelexaError."""
    need_engine()
    return resolve(name)


def need_engine() -> None:
    """Raises HelexaError with what to do where only the base package is installed."""
    if importlib.util.find_spec("torch") is None:
        raise HelexaError(
            "this command runs a model in place and needs the engine: pip install 'helexa[neuron]'"
        )
