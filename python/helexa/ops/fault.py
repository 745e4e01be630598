"""Faults on purpose, for tests of what happens after them."""

import torch

from helexa import _C
from helexa.ops.tensor import EMULATED


def trap(device: torch.device | str) -> None:
    """Queues a kernel that fails: from then on every call to the device fails, until the process ends."""
    _C.trap_cuda(_stream(device))


def spin(device: torch.device | str, seconds: float) -> None:
    """Queues a kernel that runs for so long."""
    _C.spin_cuda(int(seconds * 1e9), _stream(device))


def _stream(device: torch.device | str) -> int:
    return 0 if EMULATED else torch.cuda.current_stream(device).cuda_stream
