"""The tensors of a file as models ask for them: matrices packed for the kernels, vectors as float32.

A matrix is packed slice by slice from the mapped file into its final place, and the slice's pages leave the
process at once, so that loading needs hardly more memory than the weights themselves.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from helexa import ops
from helexa.errors import InvalidFile, OutOfMemory
from helexa.quant import FORMATS
from helexa.weights.gguf import TensorInfo

logger = logging.getLogger(__name__)

_SLICE_BYTES = 16 << 20
_FLOATS = ("f32", "f16", "bf16")


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far loading is. phase: header, weights or ready.   percent: of the tensors' bytes."""

    phase: str
    percent: float


class TensorFile(Protocol):
    """A model's tensors by GGUF's names and in its conventions: a GGUF file, or a checkpoint seen as one."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def data(self, name: str) -> memoryview:
        """All bytes of a tensor."""

    def rows(self, name: str, first: int, end: int) -> memoryview:
        """The bytes of some rows of a tensor; stacked matrices are one."""

    def prefetch(self, offset: int, nbytes: int) -> None:
        """Asks the system to read a range, by TensorInfo.offset, soon; does not wait."""

    def release_rows(self, name: str, first: int, end: int) -> None:
        """Says that some rows have been read."""


class GGUFWeights:
    """What models take their weights from; each tensor is converted once and then shared.

    progress is called on the calling thread: phase header at once, phase weights after each slice; it is the
    caller who knows when the model is ready.
    """

    def __init__(self, file: TensorFile, *, progress: Callable[[LoadProgress], None] | None = None):
        self.file = file
        self._progress = progress or (lambda progress: None)
        self._matrices: dict[tuple[str, ops.RowBlocks | None], ops.PackedWeight] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        self._arena = ops.WeightArena()
        self._requested: set[int] = set()  # parts of the file, by number, that were prefetched
        self._done_bytes, self._all_bytes = 0, sum(info.nbytes for info in file.tensors.values())
        self._progress(LoadProgress("header", 0.0))

    def __contains__(self, name: object) -> bool:
        return name in self.file.tensors

    def linear(self, name: str, blocks: ops.RowBlocks | None = None) -> ops.PackedWeight:
        """The matrix `name`, packed; a stack of matrices is one matrix with all their rows, a vector one row.

        With blocks, the rows first … end of each block, one after the other.  Raises InvalidFile if it is
        missing, no matrix or has fewer rows, OutOfMemory if it does not fit.
        """
        if (name, blocks) not in self._matrices:
            self._matrices[name, blocks] = self._pack(self._find(name, "a matrix", 1, 2, 3), blocks)
        return self._matrices[name, blocks]

    def vector(self, name: str) -> torch.Tensor:
        """The small tensor `name`, float32; InvalidFile if missing, too deep or not of a float format."""
        if name not in self._vectors:
            info = self._find(name, "a vector", 1, 2)
            if info.format not in _FLOATS:
                raise self._misfit(info, f"one of {', '.join(_FLOATS)}")
            values = FORMATS[info.format].dequantize(self.file.data(name))
            self._vectors[name] = torch.from_numpy(values).view(info.shape)
            self._advance(info.nbytes)
        return self._vectors[name]

    def unused(self) -> list[str]:
        """The tensors that nobody asked for, in file order."""
        used = {name for name, _ in self._matrices} | self._vectors.keys()
        return [name for name in self.file.tensors if name not in used]

    def _find(self, name: str, expected: str, *num_dimensions: int) -> TensorInfo:
        info = self.file.tensors.get(name)
        if info is None:
            found = f"no tensor {name!r} among {len(self.file.tensors)}"
            raise InvalidFile(f"{self.file.path.name}: found {found}, expected one")
        if len(info.shape) not in num_dimensions:
            raise self._misfit(info, expected)
        return info

    def _misfit(self, info: TensorInfo, expected: str) -> InvalidFile:
        found = f"tensor {info.name!r}, {info.format} {list(info.shape)}"
        return InvalidFile(f"{self.file.path.name}: found {found}, expected {expected}")

    def _pack(self, info: TensorInfo, blocks: ops.RowBlocks | None) -> ops.PackedWeight:
        cols, file_rows, row_bytes = info.shape[-1], info.num_rows, info.row_bytes
        parts = blocks or ((0, file_rows),)
        rows = sum(end - first for first, end in parts)
        if any(not 0 <= first < end <= file_rows for first, end in parts):
            raise self._misfit(info, f"at least {max(end for _, end in parts)} rows")
        try:
            weight = ops.empty_packed(info.format, rows, cols, self._arena)
        except (OSError, MemoryError) as error:
            needed = ops.packed_nbytes(info.format, rows, cols)
            raise OutOfMemory(f"no {needed} bytes of memory for tensor {info.name!r}: {error}") from error
        step = max(_SLICE_BYTES // row_bytes // ops.TILE_ROWS, 1) * ops.TILE_ROWS
        for place in range(0, rows, step):
            count = min(step, rows - place)
            pieces = []
            for first, end in _cut(parts, place, count):
                self._read_ahead(info.offset + first * row_bytes)
                pieces.append(self.file.rows(info.name, first, end))
                self._advance((end - first) * row_bytes)
            ops.pack_rows(
                info.format, pieces[0] if len(pieces) == 1 else b"".join(pieces), place, count, weight
            )
            if blocks is None:
                self.file.release_rows(info.name, place, place + count)
        return weight

    def _read_ahead(self, position: int) -> None:
        """Has the system read the part of the file at `position` and two more, whatever they hold."""
        first = position // _SLICE_BYTES
        for part in range(first, first + 3):
            if part not in self._requested:
                self._requested.add(part)
                self.file.prefetch(part * _SLICE_BYTES, _SLICE_BYTES)

    def _advance(self, nbytes: int) -> None:
        self._done_bytes += nbytes
        self._progress(LoadProgress("weights", 100 * self._done_bytes / self._all_bytes))


def _cut(parts: ops.RowBlocks, place: int, count: int) -> list[tuple[int, int]]:
    """The rows of the file that are rows place … place + count of the parts one after the other."""
    found = []
    for first, end in parts:
        low, high = max(place, 0), min(place + count, end - first)
        if low < high:
            found.append((first + low, first + high))
        place -= end - first
    return found
