"""The tensors of a file as models ask for them: matrices packed for the kernels, vectors as float32.

For the CPU a matrix is packed slice by slice from the mapped file into its final place, and the slice's pages
leave the process at once, so that loading needs hardly more memory than the weights themselves. For a CUDA
device a matrix gets its place when it is asked for, and its content by and by until `finish`.
"""

import logging
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Self

import torch

from helexa import ops
from helexa.errors import InvalidFile, OutOfMemory
from helexa.log import fields
from helexa.quant import FORMATS
from helexa.weights.gguf import TensorInfo
from helexa.weights.mapped import joined_ranges
from helexa.weights.parking import ParkedMatrix, ParkedWeights, Place
from helexa.weights.tensor_file import TensorFile

logger = logging.getLogger(__name__)

_SLICE_BYTES = 16 << 20
_FLOATS = ("f32", "f16", "bf16")


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far loading is. phase: header, weights or ready.   percent: of the tensors' bytes."""

    phase: str
    percent: float


class GGUFWeights:
    """What models take their weights from; each tensor is converted once and then shared.

    On a CUDA device it is a context: leaving it waits for the weights, or gives up after an exception; the
    file has to stay open until then. progress is called on the calling thread: phase header at once, phase
    weights after each slice; it is the caller who knows when the model is ready.
    """

    def __init__(
        self,
        file: TensorFile,
        *,
        device: torch.device | str = "cpu",
        num_readers: int | None = None,
        progress: Callable[[LoadProgress], None] | None = None,
        parked: ParkedWeights | None = None,
        tables: Collection[str] = (),
    ):
        """num_readers: threads that bring weights to a CUDA device; None: by the number of processors.
        parked: what `park` gave for the same tensors; these are copied back then, and the file is not read.
        tables: matrices of which a CUDA device only looks up rows, which leaves them in main memory.

        Raises OutOfMemory if the device has no room for the file's tensors.
        """
        self.file = file
        self.device = torch.device(device)
        self._progress = progress or (lambda progress: None)
        self._matrices: dict[tuple[str, ops.RowBlocks | None], ops.PackedWeight] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        self._table_names = frozenset(tables)
        self._tables: dict[str, ops.RowTable] = {}
        self._requested: set[int] = set()  # parts of the file, by number, that were prefetched
        self._parked = parked
        self._done_bytes, self._all_bytes = 0, sum(info.nbytes for info in file.tensors.values())
        # What a device is sent of the tensors: floats, if it has to quantize them.
        self._sent = {name: (file.floats_of(name) or file).tensors[name] for name in file.tensors}
        self._progress(LoadProgress("header", 0.0))
        self._loader: ops.WeightLoader | None = None
        if self.device.type == "cuda" or num_readers is not None:
            self._arena: ops.Arena = self._device_arena()
            self._loader = ops.WeightLoader(
                self.device,
                part_bytes=self._part_bytes(),
                num_readers=num_readers,
                quantizes=any(info.format != file.tensors[name].format for name, info in self._sent.items()),
            )
            self._all_bytes = sum(info.nbytes for info in self._sent.values())
            if parked is not None:
                self._all_bytes = parked.memory.nbytes
                self._copy_back(parked)
        else:
            self._arena = ops.WeightArena()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None:
                self.finish()
                return
        except BaseException:
            self._drop()
            raise
        self.cancel()
        self._drop()

    def finish(self) -> None:
        """Waits until all tensors that were asked for are in their places. Raises InvalidFile."""
        if self._loader is not None:
            self._send_tables()
            loader, self._loader = self._loader, None
            before = self._done_bytes
            try:
                loader.finish(lambda nbytes: self._advance(before + nbytes - self._done_bytes))
                self._parked = None
            except EOFError as error:
                found, name = "a file cut while open", error.args[0]
                raise InvalidFile(
                    f"{self.file.path.name}: found {found}, expected all of tensor {name!r}"
                ) from error
            except OSError as error:  # the file that it names is the tensor
                tensor = "" if error.filename is None else f" while reading tensor {error.filename!r}"
                raise InvalidFile(f"{self.file.path.name}: {error.strerror or error}{tensor}") from error
            except ops.UnfitValues as error:
                reason, name = error.args
                raise InvalidFile(f"{self.file.path.name}: found in tensor {name!r} that {reason}") from error

    def cancel(self) -> None:
        """Gives up what is still on its way; returns when nothing is any more."""
        if self._loader is not None:
            loader, self._loader = self._loader, None
            loader.cancel()

    def _drop(self) -> None:
        """Gives a device's memory back although what was built of it, and tracebacks, still know of it."""
        if isinstance(self._arena, ops.DeviceArena):
            self._arena.drop()

    def __contains__(self, name: object) -> bool:
        return name in self.file.tensors

    def linear(self, name: str, blocks: ops.RowBlocks | None = None) -> ops.PackedWeight:
        """The matrix `name`, packed; a stack of matrices is one matrix with all their rows, a vector one row.

        With blocks, the rows first … end of each block, one after the other.  Raises InvalidFile if it is
        missing, no matrix or has fewer rows, OutOfMemory if it does not fit.
        """
        key = name, blocks
        if key not in self._matrices and self._parked is not None and key in self._parked.matrices:
            found = self._parked.matrices[key]
            data = found.place.of(self._device_memory)
            self._matrices[key] = ops.PackedWeight(found.format, found.rows, found.cols, data)
        elif key not in self._matrices:
            self._matrices[key] = self._pack(self._find(name, "a matrix", 1, 2, 3), blocks)
        return self._matrices[key]

    def table(self, name: str) -> ops.PackedWeight | ops.RowTable:
        """The matrix `name` for looking up rows, in main memory if it may stay there; raises as `linear`."""
        if name not in self._table_names or self._loader is None:
            return self.linear(name)
        if name not in self._tables and self._parked is not None and name in self._parked.tables:
            self._tables[name] = self._parked.tables[name]
        elif name not in self._tables:
            info = self._find(name, "a matrix", 2)
            try:
                table = ops.empty_table(info.format, info.num_rows, info.shape[-1], self.device)
            except (OSError, MemoryError) as error:
                raise _no_memory(info.nbytes, name, error) from error
            self._tables[name] = table
        return self._tables[name]

    def vector(self, name: str) -> torch.Tensor:
        """The small tensor `name`, float32; InvalidFile if missing, too deep or not of a float format."""
        if name not in self._vectors and self._parked is not None and name in self._parked.vectors:
            shape, place = self._parked.vectors[name]
            # Before the rest, because models compute with vectors while they are put together.
            data = _send_soon(place.of(self._parked.memory), place.of(self._device_memory))
            self._vectors[name] = data.view(torch.float32).view(shape)
        elif name not in self._vectors:
            info = self._find(name, "a vector", 1, 2)
            if info.format not in _FLOATS:
                raise self._misfit(info, f"one of {', '.join(_FLOATS)}")
            values = FORMATS[info.format].dequantize(self.file.data(name))
            self._vectors[name] = self._placed(torch.from_numpy(values)).view(info.shape)
            self._advance(info.nbytes)
        return self._vectors[name]

    @property
    def placed_bytes(self) -> int:
        """Of the one allocation on a device that has the weights; 0 for weights in main memory."""
        return self._arena.memory.nbytes if isinstance(self._arena, ops.DeviceArena) else 0

    @property
    def parked_bytes(self) -> int:
        """That `park` would take, or keep, of main memory."""
        return self.placed_bytes + sum(table.data.nbytes for table in self._tables.values())

    def park(self) -> ParkedWeights | None:
        """A copy of all weights in main memory, for another load; None if there is no room for it.

        Only for weights on a device, once they are all there.
        """
        if not isinstance(self._arena, ops.DeviceArena):
            return None
        memory = self._arena.memory
        matrices, vectors = {}, {}
        try:
            for key, weight in self._matrices.items():
                matrices[key] = ParkedMatrix(
                    weight.format, weight.rows, weight.cols, _place(weight.data, memory)
                )
            for name, vector in self._vectors.items():
                vectors[name] = vector.shape, _place(vector, memory)
            copy = ops.WeightArena().take(memory.nbytes)
        except (OSError, MemoryError, ValueError) as error:
            logger.warning("weights_not_parked", extra=fields(model=self.file.path.name, error=error))
            return None
        loader = ops.WeightLoader(self.device)
        for place in _slices(memory.nbytes):
            loader.store(place.of(copy), place.of(memory), "the weights")
        loader.finish(lambda nbytes: None)
        return ParkedWeights(copy, matrices, vectors, dict(self._tables))

    def unused(self) -> list[str]:
        """The tensors that nobody asked for, in file order."""
        used = {name for name, _ in self._matrices} | self._vectors.keys() | self._tables.keys()
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
        cols, file_rows = info.shape[-1], info.num_rows
        parts = blocks or ((0, file_rows),)
        rows = sum(end - first for first, end in parts)
        if any(not 0 <= first < end <= file_rows for first, end in parts):
            raise self._misfit(info, f"at least {max(end for _, end in parts)} rows")
        try:
            weight = ops.empty_packed(info.format, rows, cols, self._arena)
        except (OSError, MemoryError, torch.OutOfMemoryError) as error:
            needed = ops.packed_nbytes(info.format, rows, cols, self.device)
            raise _no_memory(needed, info.name, error) from error
        if self._loader is not None:
            self._send(info, parts, weight)
        else:
            self._pack_slices(info, parts, weight, in_order=blocks is None)
        return weight

    def _send(self, info: TensorInfo, parts: ops.RowBlocks, weight: ops.PackedWeight) -> None:
        """Has the rows brought to the weight on the device."""
        assert self._loader is not None
        sent = self._sent[info.name]
        file = self.file.floats_of(info.name) or self.file
        step = max(ops.SLOT_BYTES // sent.row_bytes // ops.TILE_ROWS, 1) * ops.TILE_ROWS
        for place in range(0, weight.rows, step):
            count = min(step, weight.rows - place)
            source = _source(file, info.name, _cut(parts, place, count))
            self._loader.pack(weight, place, count, source, info.name, sent.format)

    def _send_tables(self) -> None:
        """Has the tables' rows brought where they stay: last, since the device has no part in it."""
        assert self._loader is not None
        for name, table in self._tables.items():
            if self._parked is not None and name in self._parked.tables:
                continue
            self._loader.pin(table, name)
            step = max(ops.SLOT_BYTES * table.rows // table.data.nbytes, 1)
            for first in range(0, table.rows, step):
                count = min(step, table.rows - first)
                source = _source(self.file, name, [(first, first + count)])
                self._loader.keep(table, first, count, source, name)

    def _part_bytes(self) -> int:
        """The most bytes that `_send` cuts."""
        infos = [*self.file.tensors.values(), *self._sent.values()]
        tiles = (min(info.num_rows, ops.TILE_ROWS) * info.row_bytes for info in infos)
        return max(ops.SLOT_BYTES, *tiles)

    def _pack_slices(
        self, info: TensorInfo, parts: ops.RowBlocks, weight: ops.PackedWeight, *, in_order: bool
    ) -> None:
        row_bytes, rows = info.row_bytes, weight.rows
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
            if in_order:
                self.file.release_rows(info.name, place, place + count)

    @property
    def _device_memory(self) -> torch.Tensor:
        assert isinstance(self._arena, ops.DeviceArena)
        return self._arena.memory

    def _copy_back(self, parked: ParkedWeights) -> None:
        """Has all parked weights brought to where they were."""
        assert self._loader is not None
        self._arena.take(parked.memory.nbytes)
        for place in _slices(parked.memory.nbytes):
            self._loader.copy(place.of(self._device_memory), place.of(parked.memory), "the weights")

    def _device_arena(self) -> ops.DeviceArena:
        """Room for all tensors of the file."""
        # With room for matrices that are asked for in two parts, each of which begins on an aligned address.
        placed = (
            ops.DeviceArena.spaced(self._placed_nbytes(info) + 1)
            for name, info in self.file.tensors.items()
            if name not in self._table_names
        )
        nbytes = sum(placed) if self._parked is None else self._parked.memory.nbytes
        try:
            return ops.DeviceArena(nbytes, self.device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"no {nbytes} bytes of memory on {self.device} for the weights: {error}"
            ) from error

    def _placed_nbytes(self, info: TensorInfo) -> int:
        """Bytes that a tensor takes on the device, as a vector or as a matrix."""
        as_vector = 4 * math.prod(info.shape) if info.format in _FLOATS and len(info.shape) < 3 else 0
        cols = info.shape[-1]
        if cols % FORMATS[info.format].block_size:
            return as_vector  # nobody can ask for it
        return max(as_vector, ops.packed_nbytes(info.format, info.num_rows, cols, self.device))

    def _placed(self, values: torch.Tensor) -> torch.Tensor:
        """Values, float32, where the weights are."""
        if not isinstance(self._arena, ops.DeviceArena):
            return values.to(self.device)
        return _send_soon(values, self._arena.take(values.nbytes).view(torch.float32))

    def _read_ahead(self, position: int) -> None:
        """Has the system read the part of the file at `position` and two more, whatever they hold."""
        first = position // _SLICE_BYTES
        for part in range(first, first + 3):
            if part not in self._requested:
                self._requested.add(part)
                self.file.prefetch(part * _SLICE_BYTES, _SLICE_BYTES)

    def _advance(self, nbytes: int) -> None:
        self._done_bytes += nbytes
        self._progress(LoadProgress("weights", min(100 * self._done_bytes / self._all_bytes, 100.0)))


def _source(file: TensorFile, name: str, pieces: list[tuple[int, int]]) -> ops.WeightSource:
    """Where rows of the file come from."""
    ranges = joined_ranges(file.row_ranges(name, first, end) for first, end in pieces)
    if ranges is not None:
        return ranges
    return lambda: b"".join(file.rows(name, first, end) for first, end in pieces)


def _no_memory(nbytes: int, name: str, error: Exception) -> OutOfMemory:
    return OutOfMemory(f"no {nbytes} bytes of memory for tensor {name!r}: {error}")


def _cut(parts: ops.RowBlocks, place: int, count: int) -> list[tuple[int, int]]:
    """The rows of the file that are rows place … place + count of the parts one after the other."""
    found = []
    for first, end in parts:
        low, high = max(place, 0), min(place + count, end - first)
        if low < high:
            found.append((first + low, first + high))
        place -= end - first
    return found


def _send_soon(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The target, to which the values are copied in the order of the current stream."""
    if not target.is_cuda:
        return target.copy_(values)
    # A copy that does not wait: there may be hundreds, each behind what the loader has queued.
    return target.copy_(values.pin_memory(), non_blocking=True)


def _place(data: torch.Tensor, memory: torch.Tensor) -> Place:
    """Where data lies in the memory; ValueError if it does not."""
    first = data.data_ptr() - memory.data_ptr()
    if first < 0 or first + data.nbytes > memory.nbytes:
        raise ValueError("the weights are not in one piece")
    return Place(first, data.nbytes)


def _slices(nbytes: int) -> list[Place]:
    step = ops.SLOT_BYTES
    return [Place(first, min(step, nbytes - first)) for first in range(0, nbytes, step)]
