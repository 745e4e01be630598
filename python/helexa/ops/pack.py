"""Weight matrices in the kernels' layout: packed once at load, bit-exact, and no larger than in the file.

The CPU's layout is csrc/quant/packed.h, that of CUDA devices csrc/quant/tiles.cuh.
"""

import mmap
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from helexa import _C
from helexa.ops.tensor import EMULATED, address, check, dtype_id, on_cuda, stream
from helexa.quant import FORMATS

TILE_ROWS = 16
RowBlocks = tuple[tuple[int, int], ...]  # rows first … end of a matrix, one block after the other
_MAPPING_BYTES = 256 << 20
_DEVICE_ALIGNMENT = 256
FORMAT_IDS = {  # csrc/quant/formats.def
    name: index
    for index, name in enumerate(
        (
            *("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"),
            *("q4_k", "q5_k", "q6_k", "q2_k", "q3_k", "iq4_nl", "iq4_xs"),
        )
    )
}


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight matrix [rows, cols] of one format; `data` holds packed_nbytes(format, rows, cols) bytes
    (uint8, [nbytes]) on the device whose kernels read it."""

    format: str
    rows: int
    cols: int
    data: Tensor = field(repr=False)

    @cached_property
    def view(self) -> _C.WeightView:
        """What the extension knows it by, without a bias."""
        return self.view_rows(0, self.rows)

    def view_rows(self, first: int, end: int, bias: Tensor | None = None) -> _C.WeightView:
        """The same of some of its rows; on a device `first` is a multiple of TILE_ROWS, on the CPU 0."""
        number, place = FORMAT_IDS[self.format], self.data.data_ptr()
        if first:
            place += _C.tiled_bytes(number, first, self.cols)
        return _C.WeightView(number, place, end - first, self.cols, address(bias))

    def dequantize(self) -> Tensor:
        """The matrix as float32 [rows, cols] on its device, with the values of the file."""
        out = torch.empty(self.rows, self.cols, device=self.data.device)
        if on_cuda(self.data):
            _C.dequantize_cuda([self.view], out.data_ptr(), self.cols, dtype_id(out), stream(out))
        else:
            ids = torch.arange(self.rows, dtype=torch.int32)
            shape = (FORMAT_IDS[self.format], self.data.data_ptr(), self.rows, self.cols)
            _C.embedding_cpu(ids.data_ptr(), self.rows, *shape, out.data_ptr())
        return out


def is_tiled(device: torch.device | str) -> bool:
    """Whether weights on a device are in the layout of CUDA kernels."""
    return EMULATED or torch.device(device).type == "cuda"


def packed_nbytes(format: str, rows: int, cols: int, device: torch.device | str = "cpu") -> int:
    """Bytes of a packed matrix on a device; raises ValueError for an unknown format or a width that is no
    multiple of its block."""
    check(format in FORMAT_IDS, f"weight format {format!r} is not one of {', '.join(FORMAT_IDS)}")
    block = FORMATS[format].block_size
    check(rows > 0 and cols > 0, f"a weight matrix of {rows} x {cols} is empty")
    check(cols % block == 0, f"{cols} columns are no multiple of the {block} columns of a {format} block")
    entry = _C.tiled_bytes if is_tiled(device) else _C.packed_bytes
    return entry(FORMAT_IDS[format], rows, cols)


class Arena(Protocol):
    """Memory for the weights of one model."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    def take(self, nbytes: int) -> Tensor:
        """nbytes uninitialised bytes, [nbytes] uint8."""


class DeviceArena:
    """One allocation on a device for the weights of one model; it lives as long as a tensor taken from it.

    memory: all of it, [nbytes] uint8.
    """

    def __init__(self, nbytes: int, device: torch.device | str):
        """torch.OutOfMemoryError if the device refuses the memory."""
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.device = self.memory.device
        self._taken = 0

    def drop(self) -> None:
        """Gives the memory back at once; tensors taken from it must not be used any more."""
        self.memory.untyped_storage().resize_(0)

    @staticmethod
    def spaced(nbytes: int) -> int:
        """What nbytes take of an arena."""
        return -(-nbytes // _DEVICE_ALIGNMENT) * _DEVICE_ALIGNMENT

    def take(self, nbytes: int) -> Tensor:
        """nbytes uninitialised bytes, [nbytes] uint8; of memory of their own once the arena is full."""
        first, self._taken = self._taken, self._taken + self.spaced(nbytes)
        if self._taken > self.memory.numel():
            self._taken = first
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return self.memory[first : first + nbytes]


class WeightArena:
    """Main memory for the weights of one model, in few large mappings that huge pages nearly cover.

    What is not taken costs address space only.  A mapping lives as long as a tensor taken from it.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> Tensor:
        """nbytes uninitialised bytes, [nbytes] uint8; OSError or MemoryError if the system refuses them."""
        spaced = whole_pages(nbytes)
        if spaced > self._free.numel():
            self._free, _ = anonymous_memory(max(spaced, _MAPPING_BYTES))
        taken, self._free = self._free[:nbytes], self._free[spaced:]
        return taken


def empty_packed(
    format: str, rows: int, cols: int, arena: Arena | None = None, device: torch.device | str = "cpu"
) -> PackedWeight:
    """A PackedWeight whose data is uninitialised memory of `arena`, or memory of its own on `device`."""
    if arena is None:
        nbytes = packed_nbytes(format, rows, cols, device)
        arena = DeviceArena(nbytes, device) if torch.device(device).type == "cuda" else WeightArena()
    return PackedWeight(format, rows, cols, arena.take(packed_nbytes(format, rows, cols, arena.device)))


def pack_rows(format: str, raw: object, first_row: int, num_rows: int, weight: PackedWeight) -> None:
    """Packs rows [first_row, first_row + num_rows) from `raw`, a buffer in the file's layout, into `weight`.

    For a weight on a device `raw` may be a tensor there, [nbytes] uint8; the work is queued on the current
    stream.  Slices may be packed in any order; first_row must be a multiple of 16.  Raises ValueError if a
    size does not fit.
    """
    layout = FORMATS[format]
    view = raw if isinstance(raw, Tensor) else np.frombuffer(raw, dtype=np.uint8)  # type: ignore[call-overload]
    nbytes, expected = view.nbytes, num_rows * (weight.cols // layout.block_size) * layout.block_bytes
    check(format == weight.format, f"rows of {format} cannot go into a {weight.format} matrix")
    check(first_row % TILE_ROWS == 0, f"first_row {first_row} is no multiple of {TILE_ROWS}")
    check(
        first_row >= 0 and first_row + num_rows <= weight.rows,
        f"row {first_row + num_rows} is beyond {weight.rows}",
    )
    check(nbytes == expected, f"{num_rows} rows of {format} take {expected} bytes, got {nbytes}")
    place = (first_row, num_rows, weight.cols, weight.data.data_ptr())
    if on_cuda(weight.data):
        there = view if isinstance(view, Tensor) else _on_device(view, weight.data.device)
        _C.pack_cuda(FORMAT_IDS[format], there.data_ptr(), *place, stream(weight.data))
    else:
        address = view.data_ptr() if isinstance(view, Tensor) else view.ctypes.data
        _C.pack_cpu(FORMAT_IDS[format], address, *place)


def pack_weight(
    format: str, raw: object, rows: int, cols: int, device: torch.device | str = "cpu"
) -> PackedWeight:
    """A whole matrix packed on `device` from `raw`, a buffer of rows in the file's layout."""
    weight = empty_packed(format, rows, cols, device=device)
    pack_rows(format, raw, 0, rows, weight)
    return weight


def _on_device(view: NDArray[np.uint8], device: torch.device) -> Tensor:
    copy = torch.empty(view.size, dtype=torch.uint8)
    copy.numpy()[:] = view.reshape(-1)
    return copy.to(device)


def whole_pages(nbytes: int) -> int:
    """Bytes of the pages that so many bytes take."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def anonymous_memory(nbytes: int, kind: type[mmap.mmap] = mmap.mmap) -> tuple[Tensor, mmap.mmap]:
    """Zeroed main memory of its own, [nbytes] uint8, in huge pages where they fit; and what it lives with."""
    memory = kind(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8), memory
