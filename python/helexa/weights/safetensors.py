"""Safetensors files and checkpoints of several of them, read through memory mappings.

A header is believed only where it fits the file: each length, shape and range is checked, and what breaks a
rule is refused with what was found and what was expected. Source: the format's description in the repository
huggingface/safetensors.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from helexa.errors import InvalidFile, UnsupportedModel
from helexa.weights.mapped import ByteRange, MappedFile

INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_JSON_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class SafetensorInfo:
    """One tensor. dtype: as the file spells it, in lower case: bf16.   offset: from the file's start."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


class SafetensorsFile(MappedFile):
    """An open file. tensors: by name, in the header's order."""

    def __init__(self, path: Path):
        """Raises InvalidFile."""
        super().__init__(path, "safetensors")
        try:
            self.tensors = _parse(self.view(0, self.nbytes, "the file"), path.name)
        except BaseException:
            self.close()
            raise

    def data(self, name: str) -> memoryview:
        """The bytes of a tensor, read-only and not copied; KeyError for an unknown name."""
        info = self.tensors[name]
        return self.view(info.offset, info.nbytes, f"tensor {name!r}")


class Checkpoint:
    """All tensors of a directory: of one file, or of the files that its index names."""

    def __init__(self, path: Path):
        """Raises InvalidFile, or UnsupportedModel for a directory that has its weights in another format."""
        self.path = path
        self._files: list[SafetensorsFile] = []
        self._file_of: dict[str, SafetensorsFile] = {}
        self.tensors: dict[str, SafetensorInfo] = {}
        try:
            for file_name, names in _files_of(path).items():
                self._add(SafetensorsFile(path / file_name), names)
        except BaseException:
            self.close()
            raise
        self.nbytes = sum(file.nbytes for file in self._files)

    def _add(self, file: SafetensorsFile, names: list[str] | None) -> None:
        self._files.append(file)
        for name in file.tensors if names is None else names:
            if name not in file.tensors:
                raise InvalidFile(f"{file.path.name}: found no tensor {name!r}, which {INDEX} says it has")
            if name in self.tensors:
                raise InvalidFile(
                    f"{file.path.name}: found tensor {name!r} again, expected it in one file only"
                )
            self.tensors[name], self._file_of[name] = file.tensors[name], file

    def data(self, name: str) -> memoryview:
        """The bytes of a tensor, read-only and not copied; KeyError for an unknown name."""
        return self._file_of[name].data(name)

    def byte_range(self, name: str, offset: int, nbytes: int) -> ByteRange:
        """Where a part of a tensor lies; KeyError for an unknown name."""
        return self._file_of[name].byte_range(self.tensors[name].offset + offset, nbytes)

    def prefetch(self, name: str, offset: int, nbytes: int) -> None:
        """Asks the system to read soon what lies `offset` bytes into a tensor, and may lie behind it."""
        self._file_of[name].prefetch(self.tensors[name].offset + offset, nbytes)

    def release(self, name: str, offset: int, nbytes: int) -> None:
        """Takes the pages of a part of a tensor out of this process."""
        self._file_of[name].release(self.tensors[name].offset + offset, nbytes)

    def close(self) -> None:
        """Closes the files; what views refer to lives as long as they. May be called again."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InvalidFile."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise InvalidFile(
                f"{path.name}: found {path.stat().st_size} bytes, expected at most {_MAX_JSON_BYTES}"
            )
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidFile(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidFile(f"{path.name}: found what is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidFile(f"{path.name}: found {type(value).__name__}, expected a JSON object")
    return value


def _files_of(path: Path) -> Mapping[str, list[str] | None]:
    """The files of a checkpoint, with the tensors to take from each; None: all."""
    if (path / INDEX).is_file():
        return _indexed(read_json(path / INDEX))
    if (path / _WHOLE).is_file():
        return {_WHOLE: None}
    found: Iterable[str] = sorted(os.listdir(path))
    files = [name for name in found if name.endswith(".safetensors")]
    if not files:
        others = [name for name in found if name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack"))]
        if others:
            raise UnsupportedModel(f"{path.name}: found weights in {others[0]}, expected them as safetensors")
        raise InvalidFile(f"{path.name}: found no weights, expected {_WHOLE} or {INDEX}")
    return dict.fromkeys(files)


def _indexed(index: Mapping[str, Any]) -> Mapping[str, list[str] | None]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidFile(f"{INDEX}: found no weight_map, expected one of tensors to files")
    files: dict[str, list[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or "/" in file or not file.endswith(".safetensors"):
            raise InvalidFile(f"{INDEX}: found {file!r} for {name!r}, expected a file beside the index")
        names = files.setdefault(file, [])
        assert names is not None
        names.append(name)
    return files


def _parse(data: memoryview, file: str) -> dict[str, SafetensorInfo]:
    """The tensors of a file, each inside of it and apart from the others."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, _MAX_HEADER_BYTES):
        raise InvalidFile(
            f"{file}: found a header of {length} bytes in a file of {len(data)}, expected it inside; "
            "the file is cut off or no safetensors file"
        )
    try:
        header = json.loads(bytes(data[8 : 8 + length]), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise InvalidFile(f"{file}: found a header that cannot be read: {error}") from None
    if not isinstance(header, dict):
        raise InvalidFile(f"{file}: found a header that is no object, expected one of tensors")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(name, entry, 8 + length, len(data), file) for name, entry in header.items()}
    end = 0
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset < end:
            raise InvalidFile(f"{file}: found tensor {info.name!r} within another, expected them apart")
        end = info.offset + info.nbytes
    return tensors


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _tensor(name: str, entry: Any, start: int, size: int, file: str) -> SafetensorInfo:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if (
        not isinstance(dtype, str)
        or not _are_sizes(shape)
        or not _are_sizes(offsets)
        or len(offsets) != 2
        or not offsets[0] <= offsets[1] <= size - start
    ):
        raise InvalidFile(
            f"{file}: found tensor {name!r} as {entry!s:.200}, expected dtype, shape and data_offsets "
            f"within the {size - start} bytes of data"
        )
    nbytes = offsets[1] - offsets[0]
    if dtype in _DTYPE_BYTES and nbytes != math.prod(shape) * _DTYPE_BYTES[dtype]:
        raise InvalidFile(
            f"{file}: found {nbytes} bytes of tensor {name!r}, expected those of {dtype} {shape}"
        )
    return SafetensorInfo(name, tuple(shape), dtype.lower(), start + offsets[0], nbytes)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
