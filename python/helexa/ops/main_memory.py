"""Main memory that kernels of a device read where it lies, over the bus: for what steps need little of.

It is pinned in pieces (`WeightLoader.keep`), which takes about as long as reading the weights of a file.
"""

import logging
import mmap
import sys
import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from helexa import _C
from helexa.log import fields
from helexa.ops.pack import anonymous_memory, whole_pages
from helexa.ops.tensor import EMULATED, check, on_cuda, stream
from helexa.quant import FORMATS

logger = logging.getLogger(__name__)

PIECE_BYTES = 8 << 20  # of memory that is pinned at once
_lock = threading.Lock()
_readable: dict[torch.device, bool] = {}


@dataclass(frozen=True, eq=False)
class RowTable:
    """A matrix [rows, cols] in main memory, in the file's layout, of which a device looks rows up.

    data: [nbytes] uint8, part of `reachable_memory`.
    """

    format: str
    rows: int
    cols: int
    data: Tensor = field(repr=False)

    def dequantize(self) -> Tensor:
        """The matrix as float32 [rows, cols] in main memory, with the values of the file."""
        values = FORMATS[self.format].dequantize(self.data.numpy())
        return torch.from_numpy(values).view(self.rows, self.cols)


class _ReachableMemory(mmap.mmap):
    """Memory that is unpinned just before it is unmapped, when other memory may get its addresses."""

    pinned: tuple[int, int, torch.device] | None = None

    def __del__(self) -> None:
        # What is left at the end goes with the process.
        if self.pinned is not None and not sys.is_finalizing():
            _unpin(*self.pinned)


def empty_table(format: str, rows: int, cols: int, device: torch.device) -> RowTable:
    """A RowTable whose content is for a WeightLoader to bring. OSError or MemoryError without memory."""
    layout = FORMATS[format]
    check(cols % layout.block_size == 0, f"{cols} columns are no multiple of a block of {format}")
    return RowTable(format, rows, cols, reachable_memory(rows * layout.nbytes(cols), device))


def reachable_memory(nbytes: int, device: torch.device) -> Tensor:
    """nbytes bytes, [nbytes] uint8, that a WeightLoader pins for a device; freed, they are pinned no more."""
    spaced = whole_pages(nbytes)
    tensor, memory = anonymous_memory(spaced, _ReachableMemory)
    assert isinstance(memory, _ReachableMemory)
    memory.pinned = tensor.data_ptr(), spaced, device
    return tensor[:nbytes]


def pinned_pieces(data: Tensor) -> list[tuple[int, int]]:
    """Addresses and bytes of the pieces of reachable memory, whole pages."""
    spaced = whole_pages(data.nbytes)
    return [
        (data.data_ptr() + first, min(PIECE_BYTES, spaced - first)) for first in range(0, spaced, PIECE_BYTES)
    ]


def copy_across(target: Tensor, source: Tensor) -> None:
    """Copies between main memory and a device, in the stream's order; waits for memory that is not pinned.

    Of tensors whose first dimension alone has gaps, such as a part of each head's tokens, the device needs no
    second copy in one piece, as torch would make it.
    """
    check(target.shape == source.shape and target.dtype == source.dtype, "copy_across: tensors differ")
    there = target if target.is_cuda else source
    is_whole = target.is_contiguous() and source.is_contiguous()
    if is_whole or not on_cuda(there) or not (target[0].is_contiguous() and source[0].is_contiguous()):
        target.copy_(source, non_blocking=target.is_pinned())
        return
    strides = (x.stride(0) * x.element_size() for x in (target, source))
    to, from_ = ((x.data_ptr(), stride) for x, stride in zip((target, source), strides, strict=True))
    _C.copy_runs_cuda(*to, *from_, target[0].nbytes, len(target), stream(there))


def reads_main_memory(device: torch.device) -> bool:
    """Whether kernels of the device can read main memory; starts CUDA on it."""
    if EMULATED:
        return True
    with _lock:
        if device not in _readable:
            _readable[device] = _try_to_pin(device)
        return _readable[device]


def _try_to_pin(device: torch.device) -> bool:
    if device.type != "cuda" or not _C.has_cuda or not _C.reads_main_memory(device.index or 0):
        return False
    tensor, _ = anonymous_memory(mmap.PAGESIZE)
    with torch.cuda.device(device):
        try:
            _C.pin(tensor.data_ptr(), tensor.nbytes)
        except _C.CudaError as error:  # not everywhere is a process allowed to
            logger.info("main_memory_not_pinned", extra=fields(device=device, error=error))
            return False
        _C.unpin(tensor.data_ptr(), tensor.nbytes, PIECE_BYTES)
    return True


def _unpin(address: int, nbytes: int, device: torch.device) -> None:
    if device.type != "cuda":
        return
    if torch.cuda.is_current_stream_capturing():  # whose capture this would end; memory may go at any time
        other = threading.Thread(target=_unpin, args=(address, nbytes, device))
        other.start()
        other.join()
        return
    with torch.cuda.device(device):  # not one that this thread would be the first to use
        _C.unpin(address, nbytes, PIECE_BYTES)
