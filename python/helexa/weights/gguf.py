"""GGUF files, versions 2 and 3, little endian, read through one memory mapping.

A header is parsed in one pass that trusts nothing: each length and count is checked against the bytes left
before anything is allocated for it, and a file that breaks a rule is refused with the place, what was found
and what was expected. Arrays of strings (a vocabulary has 150,000) are only measured and decoded on demand.
Source: the GGUF specification in the ggml repository, docs/gguf.md.
"""

import math
import mmap
import os
import struct
from array import array
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, overload

import numpy as np

from helexa.errors import InvalidFile, UnsupportedModel
from helexa.quant import FORMATS
from helexa.weights.mapped import ByteRange, MappedFile

_FORMAT_OF_TYPE = {fmt.ggml_type: fmt for fmt in FORMATS.values()}
_OTHER_TYPES = {  # named when a well-formed file is refused
    9: "q8_1", 15: "q8_k", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s", 21: "iq3_s", 22: "iq2_s",
    24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64", 29: "iq1_m", 34: "tq1_0", 35: "tq2_0",
    39: "mxfp4", 40: "nvfp4",
}  # fmt: skip

_BOOL, _STRING, _ARRAY = 7, 8, 9
_DTYPES = {
    kind: np.dtype(code)
    for kind, code in enumerate(
        ["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "u1", "", "", "<u8", "<i8", "<f8"]
    )
    if code
}

# Far beyond any real header, and low enough that a hostile one is refused within about a second.
_MAX_ENTRIES = 1 << 17
_MAX_ARRAY_ITEMS = 1 << 21
_MAX_STRING_BYTES = 1 << 24
_MAX_NAME_BYTES = 1 << 10
_MAX_DIMENSIONS = 4
# The least that one of each can take: two lengths, a type and a byte; name, dimension, type and offset.
_KEY_BYTES, _TENSOR_BYTES = 13, 32

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor. shape: outermost first, so a matrix is (rows, cols).   offset: from the file's start."""

    name: str
    shape: tuple[int, ...]
    format: str
    offset: int
    nbytes: int

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.num_rows


class StringArray(Sequence[str]):
    """An array of strings in a header, decoded when first asked for; InvalidFile if one is not UTF-8."""

    def __init__(self, raw: bytes, ends: Sequence[int], label: str):
        """raw: items as in the file, an 8-byte length before each.   ends: end of each item in raw."""
        self._raw, self._ends, self._label = raw, ends, label
        self._items: list[str] | None = None

    def tolist(self) -> list[str]:
        """All strings; the same list at each call."""
        raw = self._raw  # before the check, as another thread drops it once it has set the items
        if self._items is None:
            start, items = 0, []
            try:
                for end in self._ends:
                    items.append(raw[start + 8 : end].decode())
                    start = end
            except UnicodeDecodeError as error:
                found = f"item {len(items)} of {self._label} is {error.object[:40]!r}"
                raise InvalidFile(f"{found}, expected UTF-8") from None
            self._items, self._raw = items, b""
        return self._items

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self.tolist()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def __repr__(self) -> str:
        return f"<StringArray of {len(self)}: {self._label}>"


class GGUFFile(MappedFile):
    """An open file.

    metadata: by key, an int, float, bool, str, numpy array or StringArray.   tensors: by name, in file order.
    """

    unread: Sequence[str] = ()  # tensors of other parts than the language model, which such files do not hold

    def __init__(self, path: Path):
        """Raises InvalidFile or UnsupportedModel."""
        super().__init__(path, "GGUF")
        try:
            self.metadata, self.tensors, self._entries = _parse(self.open_map(), path.name)
        except BaseException:
            self.close()
            raise
        self.architecture: str = self.metadata["general.architecture"]

    def text_metadata(self) -> dict[str, Any]:
        """The metadata; they hold the tokenizer, too."""
        return self.metadata

    def entry(self, key: str) -> bytes:
        """A metadata key with its value, as they stand in the file."""
        start, end = self._entries[key]
        return bytes(self.view(start, end - start, f"the value of {key!r}"))

    def data(self, name: str) -> memoryview:
        """The bytes of a tensor, read-only and not copied; they stay valid after close().

        Raises KeyError for an unknown name, ValueError once closed, InvalidFile if the file has been cut.
        """
        info = self.tensors[name]
        return self.view(info.offset, info.nbytes, f"tensor {name!r}")

    def rows(self, name: str, first: int, end: int) -> memoryview:
        """The bytes of some rows of a tensor, as `data` gives them all; stacked matrices are one."""
        row_bytes = self.tensors[name].row_bytes
        return self.data(name)[first * row_bytes : end * row_bytes]

    def row_ranges(self, name: str, first: int, end: int) -> Sequence[ByteRange]:
        """Where the bytes of some rows lie, in order. Raises KeyError or ValueError as `data`."""
        info = self.tensors[name]
        return [self.byte_range(info.offset + first * info.row_bytes, (end - first) * info.row_bytes)]

    def floats_of(self, name: str) -> None:
        """None: every tensor is as it stands."""

    def release_rows(self, name: str, first: int, end: int) -> None:
        """Takes the pages of some rows out of this process, as `release` does."""
        info = self.tensors[name]
        self.release(info.offset + first * info.row_bytes, (end - first) * info.row_bytes)


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """The file at `path`, its header parsed and checked; raises InvalidFile or UnsupportedModel."""
    return GGUFFile(Path(path))


class _Cursor:
    """A position in the header. Each read checks first that its bytes exist; a refusal names the offset."""

    def __init__(self, data: mmap.mmap, name: str):
        self.data, self.file_name = data, name
        self.position, self.end = 0, len(data)

    def refuse(self, offset: int, found: str, expected: str) -> NoReturn:
        raise InvalidFile(f"{self.file_name}: at byte {offset}: found {found}, expected {expected}")

    def skip(self, nbytes: int, what: str) -> int:
        """Moves over nbytes and returns where they start."""
        start, left = self.position, self.end - self.position
        if nbytes > left:
            self.refuse(start, f"the end of the file after {left} bytes", f"{nbytes} bytes of {what}")
        self.position = start + nbytes
        return start

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.data, self.skip(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self.data, self.skip(8, what))[0]
        return value

    def count(self, what: str, item_bytes: int, most: int) -> int:
        """A number of items of at least item_bytes each; refused unless all can lie in the bytes left."""
        start, value = self.position, self.u64(f"the number of {what}")
        left = self.end - self.position
        if value * item_bytes > left:
            self.refuse(start, f"{value} {what}", f"at most {left // item_bytes} in the {left} bytes left")
        if value > most:
            self.refuse(start, f"{value} {what}", f"at most {most}")
        return value

    def name(self, what: str) -> str:
        start, name = self.position, self.text(f"a {what}", _MAX_NAME_BYTES)
        return name or self.refuse(start, f"an empty {what}", "a name")

    def text(self, what: str, most: int, errors: str = "strict") -> str:
        length = self.count(f"bytes in {what}", 1, most)
        start = self.skip(length, what)
        raw = self.data[start : start + length]
        try:
            return raw.decode("utf-8", errors)
        except UnicodeDecodeError:
            self.refuse(start, f"{what} {raw[:40]!r}", "UTF-8")

    def value(self, key: str) -> Any:
        start, kind = self.position, self.u32(f"the type of {key!r}")
        if kind == _STRING:
            # What someone wrote into a description does not decide whether a model loads.
            return self.text(key, _MAX_STRING_BYTES, errors="replace")
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _DTYPES:
            self.refuse(start, f"value type {kind} of {key!r}", "0 to 12")
        return self.numbers(kind, 1, key).item()

    def array(self, key: str) -> Any:
        start, kind = self.position, self.u32(f"the item type of {key!r}")
        if kind == _STRING:
            return self.strings(key)
        if kind not in _DTYPES:
            found = "nested arrays" if kind == _ARRAY else f"items of type {kind}"
            self.refuse(start, f"{found} in {key!r}", "numbers, booleans or strings")
        return self.numbers(
            kind, self.count(f"items in {key!r}", _DTYPES[kind].itemsize, _MAX_ARRAY_ITEMS), key
        )

    def numbers(self, kind: int, count: int, key: str) -> np.ndarray[Any, Any]:
        dtype = _DTYPES[kind]
        start = self.skip(count * dtype.itemsize, f"the value of {key!r}")
        values = np.frombuffer(self.data, dtype, count, start).copy()
        if kind != _BOOL:
            return values
        if count and values.max() > 1:
            self.refuse(start + int(values.argmax()), f"boolean {values.max()} in {key!r}", "0 or 1")
        return values.astype(bool)

    def strings(self, key: str) -> StringArray:
        count = self.count(f"strings in {key!r}", 8, _MAX_ARRAY_ITEMS)
        start = position = self.position
        data, length_at, ends = self.data, _U64.unpack_from, array("Q")
        try:
            # The one loop per vocabulary entry; what it may run past is checked once, below.
            for _ in range(count):
                position += 8 + length_at(data, position)[0]
                ends.append(position - start)
        except (struct.error, OverflowError):
            position = self.end + 1
        if position > self.end:
            index = bisect(ends, self.end - start)
            last = start + (ends[index - 1] if index else 0)
            self.refuse(
                last, f"string {index} of {key!r} beyond the end", f"it in the {self.end - last} bytes left"
            )
        self.position = position
        return StringArray(data[start:position], ends, f"{key!r} in {self.file_name}")


def _parse(
    data: mmap.mmap, name: str
) -> tuple[dict[str, Any], dict[str, TensorInfo], dict[str, tuple[int, int]]]:
    """The metadata, the tensors, and where each key of the metadata starts and its value ends."""
    cursor = _Cursor(data, name)
    _check_version(cursor)
    num_tensors = cursor.count("tensors", _TENSOR_BYTES, _MAX_ENTRIES)
    num_keys = cursor.count("metadata keys", _KEY_BYTES, _MAX_ENTRIES)
    metadata: dict[str, Any] = {}
    entries: dict[str, tuple[int, int]] = {}
    for _ in range(num_keys):
        start, key = cursor.position, cursor.name("metadata key")
        if key in metadata:
            cursor.refuse(start, f"metadata key {key!r} again", "each key once")
        metadata[key] = cursor.value(key)
        entries[key] = start, cursor.position
    _check_metadata(metadata, name)
    tensors: dict[str, TensorInfo] = {}
    alignment = metadata.get("general.alignment", 32)
    for _ in range(num_tensors):
        start, info = cursor.position, _tensor_info(cursor, alignment)
        if info.name in tensors:
            cursor.refuse(start, f"tensor {info.name!r} again", "each name once")
        tensors[info.name] = info
    return metadata, _place(tensors, -(-cursor.position // alignment) * alignment, cursor), entries


def _check_version(cursor: _Cursor) -> None:
    magic = cursor.data[cursor.skip(4, "the magic b'GGUF'") : cursor.position]
    if magic != b"GGUF":
        cursor.refuse(0, f"{magic!r}", "b'GGUF', with which every GGUF file begins")
    version = cursor.u32("the version")
    if version in (2, 3):
        return
    if version and version & 0xFFFF == 0:
        raise UnsupportedModel(
            f"{cursor.file_name}: found a big-endian GGUF file, expected a little-endian one"
        )
    raise UnsupportedModel(f"{cursor.file_name}: found GGUF version {version}, expected 2 or 3")


def _check_metadata(metadata: dict[str, Any], name: str) -> None:
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise InvalidFile(
            f"{name}: found general.architecture {architecture!r}, expected an architecture's name"
        )
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise InvalidFile(f"{name}: found general.alignment {alignment!r}, expected a power of two")
    num_parts = metadata.get("split.count", 0)
    if type(num_parts) is int and num_parts > 1:
        raise UnsupportedModel(
            f"{name}: found one of {num_parts} parts of a model, expected it whole in one file"
        )


def _tensor_info(cursor: _Cursor, alignment: int) -> TensorInfo:
    """The next entry of the tensor table; its offset is still relative to the data section."""
    name = cursor.name("tensor name")
    start, num_dimensions = cursor.position, cursor.u32(f"the number of dimensions of {name!r}")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        cursor.refuse(start, f"{num_dimensions} dimensions of tensor {name!r}", f"1 to {_MAX_DIMENSIONS}")
    shape = tuple(cursor.u64(f"the shape of {name!r}") for _ in range(num_dimensions))[::-1]
    kind = cursor.u32(f"the type of {name!r}")
    offset = cursor.u64(f"the offset of {name!r}")
    if kind not in _FORMAT_OF_TYPE:
        label = f" ({_OTHER_TYPES[kind]})" if kind in _OTHER_TYPES else ""
        found = f"tensor {name!r} of type {kind}{label}"
        raise UnsupportedModel(f"{cursor.file_name}: found {found}, expected one of {', '.join(FORMATS)}")
    fmt = _FORMAT_OF_TYPE[kind]
    if min(shape) == 0:
        cursor.refuse(start, f"the empty shape {shape} of tensor {name!r}", "at least 1 in each dimension")
    if shape[-1] % fmt.block_size:
        expected = f"whole blocks of the {fmt.block_size} values of {fmt.name}"
        cursor.refuse(start, f"{shape[-1]} columns in tensor {name!r}", expected)
    if offset % alignment:
        cursor.refuse(
            cursor.position - 8, f"offset {offset} of tensor {name!r}", f"a multiple of {alignment}"
        )
    return TensorInfo(name, shape, fmt.name, offset, fmt.nbytes(math.prod(shape)))


def _place(tensors: dict[str, TensorInfo], data_start: int, cursor: _Cursor) -> dict[str, TensorInfo]:
    """The tensors with offsets from the file's start, once all are known to lie inside it and apart."""
    placed = {name: replace(info, offset=data_start + info.offset) for name, info in tensors.items()}
    last_name, last_end = "", data_start
    for info in sorted(placed.values(), key=lambda info: info.offset):
        end = info.offset + info.nbytes
        if end > cursor.end:
            found = f"tensor {info.name!r}, {info.format} {list(info.shape)}, up to byte {end}"
            raise InvalidFile(
                f"{cursor.file_name}: found {found}, expected at most the file's {cursor.end} bytes"
            )
        if info.offset < last_end:
            found = f"tensor {info.name!r} at byte {info.offset}"
            raise InvalidFile(
                f"{cursor.file_name}: found {found}, expected it after {last_name!r}, from {last_end} on"
            )
        last_name, last_end = info.name, end
    return placed
