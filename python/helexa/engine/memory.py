"""Main memory: what there is, what is free, what this process holds. From /proc and control groups.

A process may be in a group whose ancestors have limits too, in either version of the groups' file system; the
tightest counts. Nothing here raises: what cannot be read is no limit.
"""

import ctypes
import errno
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from helexa import ops
from helexa.errors import OutOfMemory

_CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
# Of cuBLAS, which has memory of its own for each thread and stream, and says no more when that is refused.
_CUBLAS_OUT_OF_MEMORY = "CUBLAS_STATUS_ALLOC_FAILED", "calling `cublasCreate"

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Group:
    """A control group that has a limit. Page cache that it can drop is counted as used by the system."""

    limit_bytes: int
    used_bytes: int
    reclaimable_bytes: int


def total_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """What this process could take if nobody else took anything; 0 if unknown."""
    return min((_meminfo(proc).get("MemTotal", 0), *(group.limit_bytes for group in _groups(proc, cgroup))))


def available_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """What this process may take now without swapping; 0 if unknown."""
    free = _meminfo(proc).get("MemAvailable", 0)
    left = (group.limit_bytes - group.used_bytes + group.reclaimable_bytes for group in _groups(proc, cgroup))
    return max(0, min((free, *left)))


def resident_bytes(proc: Path = PROC) -> int:
    """What this process holds that is not in a file; 0 if unknown."""
    status = _fields(proc / "self/status")
    return status.get("RssAnon", 0) + status.get("RssShmem", 0)


def release() -> None:
    """Gives unused memory back to the system and to the devices, as far as the allocators can."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        with suppress(RuntimeError):  # a device that is lost
            ops.free_unused()
    with suppress(OSError, AttributeError):  # a system with another C library
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def allocation_errors() -> Iterator[None]:
    """Makes OutOfMemory of an allocation that fails: while loading, that is no fault of the device."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"the memory does not suffice: {error}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory of the host or of a device was refused, of which nothing is left that hurts others."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    code = getattr(error, "code" if isinstance(error, ops.CudaError) else "error_code", None)
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or code == _CUDA_OUT_OF_MEMORY  # also of a launch, whose code is loaded when it is first needed
        or any(words in str(error) for words in _CUBLAS_OUT_OF_MEMORY)
        or "can't allocate memory" in text
        or "not enough memory" in text
    )


def _groups(proc: Path, cgroup: Path) -> Iterator[_Group]:
    """The groups of this process that have a limit, innermost first."""
    paths = {"memory": "/", "": "/"}  # of version 1 and of version 2
    for line in _lines(proc / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        paths |= {name: path for name in controllers.split(",") if name in paths}
    yield from _limits(
        cgroup / "memory",
        paths["memory"],
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    yield from _limits(cgroup, paths[""], ("memory.max", "memory.current", "inactive_file"))


def _limits(root: Path, path: str, names: tuple[str, str, str]) -> Iterator[_Group]:
    folder = root / path.strip("/")
    while folder.is_relative_to(root):
        limit, used = (_number(folder / name) for name in names[:2])
        if limit is not None and used is not None:
            yield _Group(limit, used, _fields(folder / "memory.stat").get(names[2], 0))
        folder = folder.parent


def _meminfo(proc: Path) -> dict[str, int]:
    return _fields(proc / "meminfo")


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number, in bytes or of kB."""
    found = {}
    for line in _lines(path):
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[1].isdecimal():
            found[words[0]] = int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return found


def _number(path: Path) -> int | None:
    text = next(iter(_lines(path)), "").strip()
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
