"""Writing GGUF files, version 3: the header at once, then the tensors row range by row range.

A file grows beside its place and is moved there when it is whole, so that no reader ever sees a part of one.
Source: the GGUF specification in the ggml repository, docs/gguf.md.
"""

import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from helexa.quant import FORMATS
from helexa.weights.gguf import TensorInfo
from helexa.weights.tensor_file import TensorFile

ALIGNMENT = 32
_SLICE_BYTES = 16 << 20
_BOOL, _STRING, _ARRAY = 7, 8, 9
_KIND_OF_DTYPE = {
    "u1": 0,
    "i1": 1,
    "u2": 2,
    "i2": 3,
    "u4": 4,
    "i4": 5,
    "f4": 6,
    "b1": 7,
    "u8": 10,
    "i8": 11,
    "f8": 12,
}


def encode_entry(key: str, value: Any) -> bytes:
    """A metadata key with its value as they stand in a file.

    An int becomes uint32 where it fits, else int32 or 64 bits; a float float32; a list the array that its
    items make. Raises TypeError for values that a file cannot hold.
    """
    kind, raw = _encode(value)
    return _string(key) + struct.pack("<I", kind) + raw


def encode_header(entries: Sequence[bytes], tensors: Iterable[TensorInfo]) -> tuple[bytes, list[int]]:
    """What stands before the tensors' data, and where in the file each tensor's data begins."""
    table, offsets, offset = [], [], 0
    for info in tensors:
        table.append(_table_entry(info, offset))
        offsets.append(offset)
        offset = _aligned(offset + info.nbytes)
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(table), len(entries)) + b"".join((*entries, *table))
    header += bytes(_aligned(len(header)) - len(header))
    return header, [len(header) + offset for offset in offsets]


def write_gguf(
    path: Path,
    entries: Iterable[bytes],
    file: TensorFile,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the tensors of `file` behind the given metadata entries.

    progress: called with the bytes of tensors written and those in all; what it raises ends the writing and
    leaves nothing behind. Raises OSError, and InvalidFile if `file` turns out to be damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as out:
            _write(out, list(entries), file, progress)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _write(
    out: BinaryIO, entries: list[bytes], file: TensorFile, progress: Callable[[int, int], None]
) -> None:
    out.write(encode_header(entries, file.tensors.values())[0])
    done, total = 0, sum(info.nbytes for info in file.tensors.values())
    for info in file.tensors.values():
        step = max(_SLICE_BYTES // info.row_bytes, 1)
        for first in range(0, info.num_rows, step):
            end = min(first + step, info.num_rows)
            done += out.write(file.rows(info.name, first, end))
            file.release_rows(info.name, first, end)
            progress(done, total)
        out.write(bytes(_aligned(info.nbytes) - info.nbytes))


def _table_entry(info: TensorInfo, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *reversed(info.shape))
    return _string(info.name) + sizes + struct.pack("<IQ", FORMATS[info.format].ggml_type, offset)


def _encode(value: Any) -> tuple[int, bytes]:
    """The type of a value, and its bytes."""
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return _integer(value)
    if isinstance(value, float):
        return _KIND_OF_DTYPE["f4"], struct.pack("<f", value)
    if isinstance(value, str):
        return _STRING, _string(value)
    if isinstance(value, Mapping) or not hasattr(value, "__len__"):
        raise TypeError(f"a GGUF file cannot hold {value!r:.80}")
    if len(value) and isinstance(value[0], str):
        return _ARRAY, struct.pack("<IQ", _STRING, len(value)) + b"".join(map(_string, value))
    array = np.asarray(value)
    if not isinstance(value, np.ndarray):  # what the field's tools write for plain numbers
        array = array.astype({"i": "<i4", "f": "<f4", "b": "?"}[array.dtype.kind])
    kind = _KIND_OF_DTYPE[array.dtype.str[1:]]
    return _ARRAY, struct.pack("<IQ", kind, array.size) + array.astype(
        array.dtype.newbyteorder("<")
    ).tobytes()


def _integer(value: int) -> tuple[int, bytes]:
    for name, low, high in (
        ("u4", 0, 1 << 32),
        ("i4", -(1 << 31), 0),
        ("u8", 0, 1 << 64),
        ("i8", -(1 << 63), 0),
    ):
        if low <= value < high:
            return _KIND_OF_DTYPE[name], value.to_bytes(int(name[1]), "little", signed=low < 0)
    raise TypeError(f"a GGUF file cannot hold {value}")


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _aligned(offset: int) -> int:
    return math.ceil(offset / ALIGNMENT) * ALIGNMENT
