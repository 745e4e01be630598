"""Weight matrices in the kernels' layout (csrc/quant/packed.h): packed once at load, bit-exact, never
unpacked as a whole."""

import mmap
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from helexa import _C
from helexa.ops.tensor import check
from helexa.quant import FORMATS

TILE_ROWS = 16
RowBlocks = tuple[tuple[int, int], ...]  # rows first … end of a matrix, one block after the other
_MAPPING_BYTES = 256 << 20
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
    (uint8, [nbytes])."""

    format: str
    rows: int
    cols: int
    data: Tensor = field(repr=False)

    def dequantize(self) -> Tensor:
        """The matrix as float32 [rows, cols], with the values of the file."""
        out = torch.empty(self.rows, self.cols)
        ids = torch.arange(self.rows, dtype=torch.int32)
        _C.embedding_cpu(
            ids.data_ptr(),
            self.rows,
            FORMAT_IDS[self.format],
            self.data.data_ptr(),
            self.rows,
            self.cols,
            out.data_ptr(),
        )
        return out


def packed_nbytes(format: str, rows: int, cols: int) -> int:
    """Bytes of a packed matrix; raises ValueError for an unknown format or a width that is no multiple of its
    block."""
    check(format in FORMAT_IDS, f"weight format {format!r} is not one of {', '.join(FORMAT_IDS)}")
    block = FORMATS[format].block_size
    check(rows > 0 and cols > 0, f"a weight matrix of {rows} x {cols} is empty")
    check(cols % block == 0, f"{cols} columns are no multiple of the {block} columns of a {format} block")
    return _C.packed_bytes(FORMAT_IDS[format], rows, cols)


class WeightArena:
    """Memory for the weights of one model, in few large mappings so that huge pages cover nearly all of it.

    What is not taken costs address space only.  A mapping lives as long as a tensor taken from it.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> Tensor:
        """nbytes uninitialised bytes, [nbytes] uint8; OSError or MemoryError if the system refuses them."""
        spaced = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if spaced > self._free.numel():
            self._free = _anonymous_memory(max(spaced, _MAPPING_BYTES))
        taken, self._free = self._free[:nbytes], self._free[spaced:]
        return taken


def empty_packed(format: str, rows: int, cols: int, arena: WeightArena | None = None) -> PackedWeight:
    """A PackedWeight whose data is uninitialised memory of `arena`, or a mapping of its own."""
    return PackedWeight(format, rows, cols, (arena or WeightArena()).take(packed_nbytes(format, rows, cols)))


def pack_rows(format: str, raw: object, first_row: int, num_rows: int, weight: PackedWeight) -> None:
    """Packs rows [first_row, first_row + num_rows) from `raw`, a buffer in the file's layout, into `weight`.

    Slices may be packed in any order; first_row must be a multiple of 16.  Raises ValueError if a size does
    not fit.
    """
    view = np.frombuffer(raw, dtype=np.uint8)  # type: ignore[call-overload]
    layout = FORMATS[format]
    expected = num_rows * (weight.cols // layout.block_size) * layout.block_bytes
    check(format == weight.format, f"rows of {format} cannot go into a {weight.format} matrix")
    check(first_row % TILE_ROWS == 0, f"first_row {first_row} is no multiple of {TILE_ROWS}")
    check(
        first_row >= 0 and first_row + num_rows <= weight.rows,
        f"row {first_row + num_rows} is beyond {weight.rows}",
    )
    check(view.nbytes == expected, f"{num_rows} rows of {format} take {expected} bytes, got {view.nbytes}")
    _C.pack_cpu(
        FORMAT_IDS[format], view.ctypes.data, first_row, num_rows, weight.cols, weight.data.data_ptr()
    )


def pack_weight(format: str, raw: object, rows: int, cols: int) -> PackedWeight:
    """A whole matrix packed from `raw`, a buffer of rows in the file's layout."""
    weight = empty_packed(format, rows, cols)
    pack_rows(format, raw, 0, rows, weight)
    return weight


def _anonymous_memory(nbytes: int) -> Tensor:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
