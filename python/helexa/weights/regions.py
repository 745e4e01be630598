"""Tensors made of regions of others: rows in another order, stacks of matrices, small ones computed.

Nothing is read before it is asked for, and of a large tensor only the rows that are asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from helexa.quant import FORMATS
from helexa.weights.mapped import ByteRange, joined_ranges
from helexa.weights.safetensors import Checkpoint, SafetensorInfo

_AHEAD_BYTES = 32 << 20

Bytes = NDArray[np.uint8]
Index = NDArray[np.int64]


class Region(Protocol):
    """A tensor in a format of GGUF. shape: outermost first; stacked matrices are one with all their rows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def format(self) -> str: ...

    def rows(self, first: int, end: int) -> Bytes:
        """The bytes of some rows, [end - first, bytes of a row]."""

    def release(self, first: int, end: int) -> None:
        """Says that some rows have been read."""


@dataclass(frozen=True)
class Whole:
    """A tensor as it stands in the checkpoint, maybe with another shape."""

    checkpoint: Checkpoint
    info: SafetensorInfo
    shape: tuple[int, ...]

    @property
    def format(self) -> str:
        return self.info.dtype

    def rows(self, first: int, end: int) -> Bytes:
        nbytes = FORMATS[self.format].nbytes(self.shape[-1])
        self.checkpoint.prefetch(self.info.name, first * nbytes, (end - first) * nbytes + _AHEAD_BYTES)
        data = self.checkpoint.data(self.info.name)[first * nbytes : end * nbytes]
        return np.frombuffer(data, np.uint8).reshape(end - first, nbytes)

    def byte_range(self, first: int, end: int) -> ByteRange:
        """Where the bytes of some rows lie."""
        nbytes = FORMATS[self.format].nbytes(self.shape[-1])
        return self.checkpoint.byte_range(self.info.name, first * nbytes, (end - first) * nbytes)

    def release(self, first: int, end: int) -> None:
        nbytes = FORMATS[self.format].nbytes(self.shape[-1])
        self.checkpoint.release(self.info.name, first * nbytes, (end - first) * nbytes)


@dataclass(frozen=True)
class ScaledBlocks:
    """A matrix of float8 numbers and its scales, one for each block of `block` rows and columns, as bf16."""

    checkpoint: Checkpoint
    info: SafetensorInfo
    scales: NDArray[np.float32]  # [row blocks, column blocks]
    block: tuple[int, int]
    format: str = "bf16"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    def rows(self, first: int, end: int) -> Bytes:
        cols = self.shape[-1]
        codes = np.frombuffer(
            self.checkpoint.data(self.info.name)[first * cols : end * cols], np.uint8
        ).reshape(-1, cols)
        scales = self.scales[np.arange(first, end) // self.block[0]].repeat(self.block[1], axis=1)[:, :cols]
        return _to_bf16(_E4M3[codes] * scales)

    def release(self, first: int, end: int) -> None:
        cols = self.shape[-1]
        self.checkpoint.release(self.info.name, first * cols, (end - first) * cols)


@dataclass(frozen=True)
class Gathered:
    """Rows of another tensor; index[i] is the one that is row i."""

    source: Region
    index: Index
    shape: tuple[int, ...]

    @property
    def format(self) -> str:
        return self.source.format

    def rows(self, first: int, end: int) -> Bytes:
        wanted = self.index[first:end]
        low, high = int(wanted.min()), int(wanted.max()) + 1
        rows = self.source.rows(low, high)
        is_run = high - low == end - first and bool((np.diff(wanted) == 1).all())
        return rows if is_run else rows[wanted - low]

    def release(self, first: int, end: int) -> None:
        if end == len(self.index):
            self.source.release(int(self.index.min()), int(self.index.max()) + 1)


@dataclass(frozen=True)
class Columns:
    """Columns of another tensor, which is of plain numbers, in another order."""

    source: Region
    index: Index

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def format(self) -> str:
        return self.source.format

    def rows(self, first: int, end: int) -> Bytes:
        width = FORMATS[self.format].block_bytes
        numbers = self.source.rows(first, end).reshape(end - first, -1, width)
        return numbers[:, self.index].reshape(end - first, -1)

    def release(self, first: int, end: int) -> None:
        self.source.release(first, end)


@dataclass(frozen=True)
class Stacked:
    """Matrices of one shape and format, one below the other."""

    sources: Sequence[Region]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.sources), *self.sources[0].shape)

    @property
    def format(self) -> str:
        return self.sources[0].format

    def rows(self, first: int, end: int) -> Bytes:
        pieces = [self.sources[number].rows(*rows) for number, rows in self.pieces(first, end)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def release(self, first: int, end: int) -> None:
        for number, rows in self.pieces(first, end):
            self.sources[number].release(*rows)

    def pieces(self, first: int, end: int) -> list[tuple[int, tuple[int, int]]]:
        """Which rows of which matrix some rows are."""
        each = self.sources[0].shape[0]
        return [
            (number, (max(first - number * each, 0), min(end - number * each, each)))
            for number in range(first // each, -(-end // each))
        ]


@dataclass(frozen=True)
class Computed:
    """A small tensor whose values, float32, are a function."""

    shape: tuple[int, ...]
    compute: Callable[[], NDArray[np.float32]]
    format: str = "f32"

    def rows(self, first: int, end: int) -> Bytes:
        values = np.ascontiguousarray(self.compute(), "<f4").reshape(-1, self.shape[-1])
        return values[first:end].view(np.uint8)

    def release(self, first: int, end: int) -> None:
        pass


def byte_ranges(region: Region, first: int, end: int) -> list[ByteRange] | None:
    """Where the bytes of some rows lie, in order; None for rows that are made of others."""
    if isinstance(region, Whole):
        return [region.byte_range(first, end)]
    if not isinstance(region, Stacked):
        return None
    return joined_ranges(
        byte_ranges(region.sources[number], *rows) for number, rows in region.pieces(first, end)
    )


def values(region: Region) -> NDArray[np.float32]:
    """All values of a region, float32, in its shape."""
    num_rows = int(np.prod(region.shape[:-1], dtype=np.int64))
    raw = np.ascontiguousarray(region.rows(0, num_rows))
    return FORMATS[region.format].dequantize(raw.reshape(-1)).reshape(region.shape)


def _e4m3_values() -> NDArray[np.float32]:
    """What each of the 256 codes of float8 e4m3 means: no infinities, and one code of each sign is NaN."""
    code = np.arange(256)
    exponent, fraction = (code >> 3) & 15, (code & 7) / 8
    size = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7.0))
    size[(code & 127) == 127] = np.nan
    return np.where(code < 128, size, -size).astype(np.float32)


_E4M3 = _e4m3_values()


def _to_bf16(numbers: NDArray[np.float32]) -> Bytes:
    """Rows of bf16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(numbers, "<f4").view("<u4")
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return rounded.view(np.uint8)
