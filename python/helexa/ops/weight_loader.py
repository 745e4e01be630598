"""The way of weights to a CUDA device, while the model that asked for them is put together, and back.

Several threads read into pinned memory, from where the bytes are copied to the device and packed there while
the threads read on. Each has two slots, so that it fills one while the other is copied, and a stream of its
own, so that one thread's packing overlaps with another's copy. They do without the interpreter
(csrc/ops/weight_loader.h), which has a tokenizer to build meanwhile.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread

import numpy as np
import torch
from torch import Tensor

from helexa import _C
from helexa._C import set_num_threads
from helexa.ops.device_memory import free_unused
from helexa.ops.main_memory import RowTable, pinned_pieces
from helexa.ops.pack import FORMAT_IDS, PackedWeight
from helexa.ops.quantize import unfit_words
from helexa.ops.tensor import EMULATED, check
from helexa.quant import FORMATS

SLOT_BYTES = 8 << 20
MOST_READERS = 8  # more do not get more of memory's bandwidth
_NUM_SLOTS = 2  # of each reader
_ALIGNMENT = 256
_PROGRESS_S = 0.02
# In the place of formats, rows and columns; csrc/ops/weight_loader.h.
_COPY, _STORE, _KEEP, _PIN = ((kind, kind, 0, 0, 0) for kind in (-1, -2, -3, -4))

Range = tuple[int, int, int]  # descriptor of a file, offset, bytes
Source = Sequence[Range] | Callable[[], object]  # what lies in files, or is given as a buffer


class UnfitValues(Exception):
    """Numbers that cannot be quantized. args: what is wrong with them, and the name of their part."""


@dataclass(frozen=True)
class _Part:
    name: str
    nbytes: int
    format: str
    read: Callable[[], object] | None
    kept: object  # memory that the part is brought from or to


class WeightLoader:
    """Brings parts of weights to a device, in no certain order."""

    def __init__(
        self,
        device: torch.device | str,
        *,
        part_bytes: int = SLOT_BYTES,
        num_readers: int | None = None,
        quantizes: bool = False,
    ):
        """part_bytes: of the largest part that will come.   quantizes: whether floats will have to be."""
        self._device = torch.device(device)
        self._slot_bytes = -(-part_bytes // _ALIGNMENT) * _ALIGNMENT
        self._quantizes = quantizes
        self._loader = _C.WeightLoader()
        self._parts: list[_Part] = []  # by number
        self._ends: SimpleQueue[BaseException | None] = SimpleQueue()  # how each thread ended
        # What the parts go to may have been used before by work that is still queued on this stream.
        self._origin = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        self._threads = [
            Thread(target=self._run, name=f"reader-{number}", daemon=True)
            for number in range(num_readers or default_readers())
        ]
        for thread in self._threads:
            thread.start()

    def pack(
        self,
        weight: PackedWeight,
        first_row: int,
        num_rows: int,
        source: Source,
        name: str,
        source_format: str | None = None,
    ) -> None:
        """Has rows packed, as `pack_rows` does, that lie in files or that a call gives as a buffer.

        source_format: of rows of floats, which are quantized on the device. The call comes from another
        thread, and files have to stay open until the loader has ended. `name` is for messages.
        """
        source_format = source_format or weight.format
        nbytes = num_rows * FORMATS[source_format].nbytes(weight.cols)
        formats = FORMAT_IDS[weight.format], FORMAT_IDS[source_format]
        self._put(
            name,
            source,
            nbytes,
            (*formats, first_row, num_rows, weight.cols),
            weight.data,
            None,
            weight.format,
        )

    def keep(self, table: RowTable, first_row: int, num_rows: int, source: Source, name: str) -> None:
        """Has rows brought to a table in main memory, from where `pack` takes them; `pin` is needed too."""
        row_bytes = table.data.nbytes // table.rows
        target = table.data[first_row * row_bytes : (first_row + num_rows) * row_bytes]
        self._put(name, source, target.nbytes, _KEEP, target)

    def pin(self, table: RowTable, name: str) -> None:
        """Has devices reach the table's memory."""
        for address, nbytes in pinned_pieces(table.data):
            self._parts.append(_Part(name, 0, "", None, table))
            self._loader.add([], nbytes, *_PIN, address)

    def copy(self, target: Tensor, source: Tensor, name: str) -> None:
        """Has bytes of main memory copied to the device; neither tensor may be changed meanwhile."""
        check(target.nbytes == source.nbytes, f"{name} has {source.nbytes} bytes, expected {target.nbytes}")
        self._put(name, [(-1, source.data_ptr(), source.nbytes)], source.nbytes, _COPY, target, source)

    def store(self, target: Tensor, source: Tensor, name: str) -> None:
        """Has bytes of the device copied to main memory."""
        check(target.nbytes == source.nbytes, f"{name} has {source.nbytes} bytes, expected {target.nbytes}")
        self._put(name, [(-1, target.data_ptr(), target.nbytes)], target.nbytes, _STORE, source, target)

    def finish(self, progress: Callable[[int], None]) -> None:
        """Waits until all parts are in their places, and ends the loader.

        progress: called on this thread, with the bytes read so far. Raises what a source raised, EOFError
        with the part's name where a file ends too early, OSError where it cannot be read, UnfitValues where
        numbers cannot be quantized.
        """
        self._loader.close()
        running = len(self._threads)
        try:
            while running:
                try:
                    end = self._ends.get(timeout=_PROGRESS_S)
                except Empty:
                    progress(self._loader.done_bytes())
                    continue
                if end is not None:
                    raise end
                running -= 1
        finally:
            self.cancel()
        if failure := self._loader.failure():
            number, code = failure
            name = self._parts[number].name
            if code < 0:
                raise UnfitValues(unfit_words(-code, self._parts[number].format), name)
            raise OSError(code, os.strerror(code), name) if code else EOFError(name)
        progress(self._loader.done_bytes())

    def cancel(self) -> None:
        """Drops the parts that have not been begun; returns when none is on its way any more."""
        self._loader.cancel()
        for thread in self._threads:
            thread.join()
        if self._origin is not None:
            free_unused()  # the slots on the device

    def _put(
        self,
        name: str,
        source: Source,
        nbytes: int,
        place: tuple[int, int, int, int, int],
        target: Tensor,
        kept: Tensor | None = None,
        format: str = "",
    ) -> None:
        check(nbytes <= self._slot_bytes, f"a part of {name} has {nbytes} bytes, slots {self._slot_bytes}")
        read = source if callable(source) else None
        self._parts.append(_Part(name, nbytes, format, read, (target, kept)))
        ranges = [] if callable(source) else [_C.ByteRange(*part) for part in source]
        self._loader.add(ranges, nbytes, *place, target.data_ptr())

    def _run(self) -> None:
        try:
            set_num_threads(1)  # a source may quantize; the readers are the parallelism
            with self._streamed() as stream:
                self._work(stream)
        except BaseException as error:
            self._loader.cancel()
            self._ends.put(error)
        else:
            self._ends.put(None)

    def _work(self, stream: int) -> None:
        is_cuda = self._device.type == "cuda"
        size = (_NUM_SLOTS, self._slot_bytes)
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=is_cuda)
        staged = torch.empty(size, dtype=torch.uint8, device=self._device)
        slots = {slot.data_ptr(): slot.numpy() for slot in pinned}
        encoded = torch.empty(
            self._slot_bytes if self._quantizes else 0, dtype=torch.uint8, device=self._device
        )
        bad = torch.zeros(_NUM_SLOTS, dtype=torch.int64, device=self._device)
        pinned_bad = torch.zeros(_NUM_SLOTS, dtype=torch.int64, pin_memory=is_cuda)
        carrier = _C.WeightCarrier(
            self._loader,
            [*slots],
            [slot.data_ptr() for slot in staged],
            encoded.data_ptr(),
            bad.data_ptr(),
            pinned_bad.data_ptr(),
            stream,
        )
        while (number := carrier.work()) >= 0:
            part = self._parts[number]
            assert part.read is not None
            found = np.frombuffer(part.read(), np.uint8).reshape(-1)  # type: ignore[call-overload]
            np.copyto(slots[carrier.slot()][: part.nbytes], found)

    @contextmanager
    def _streamed(self) -> Iterator[int]:
        """The handle of a stream of this thread's own, the current one; waits for its work in the end."""
        if self._origin is None:
            yield 0
            return
        torch.cuda.set_device(self._device)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(self._origin)
        with torch.cuda.stream(stream):
            try:
                yield stream.cuda_stream
            finally:
                stream.synchronize()


def keep_slots() -> None:
    """Has torch get the pinned memory that loads need, and keep it."""
    size = (_NUM_SLOTS, SLOT_BYTES)
    [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(default_readers())]


def default_readers() -> int:
    """One for each processor, as far as that helps; emulated kernels run on one thread."""
    return 1 if EMULATED else min(MOST_READERS, len(os.sched_getaffinity(0)))
