"""Tiny GGUF files, written by the `gguf` package (well-formed) or byte by byte (anything else)."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from helexa.quant import FORMATS

# Where the float16 fields of a block are, if there is not only one at its start.
HALF_OFFSETS = {
    "q4_1": (0, 2), "q5_1": (0, 2), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
    "q2_k": (80, 82), "q3_k": (108,),
}  # fmt: skip

WriteGguf = Callable[..., Path]


def raw_matrix(format: str, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Random blocks in the file's layout, uint8 [rows, bytes of a row], all of whose values are finite."""
    fmt = FORMATS[format]
    rng = np.random.default_rng([seed, fmt.ggml_type])
    if format in ("f32", "f16", "bf16"):
        values = rng.standard_normal((rows, cols), np.float32)
        return (
            gguf.quants.quantize(values, gguf.GGMLQuantizationType(fmt.ggml_type))
            .view(np.uint8)
            .reshape(rows, -1)
        )
    blocks = rng.integers(0, 256, (rows * cols // fmt.block_size, fmt.block_bytes), np.uint8)
    for offset in HALF_OFFSETS.get(format, (0,)):
        scales = rng.uniform(-1, 1, len(blocks)).astype("<f2")
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGguf:
    """Writes a file of the given tensors, {name: (format, shape) or a float32 array}; returns its path."""

    def write(
        tensors: Mapping[str, tuple[str, tuple[int, ...]] | np.ndarray],
        *,
        name: str = "tiny.gguf",
        architecture: str = "llama",
        add: Callable[[gguf.GGUFWriter], Any] = lambda writer: None,
    ) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        add(writer)
        for seed, (tensor, content) in enumerate(tensors.items()):
            if isinstance(content, np.ndarray):
                writer.add_tensor(tensor, content)
                continue
            format, shape = content
            raw = raw_matrix(format, int(np.prod(shape[:-1])), shape[-1], seed).reshape(*shape[:-1], -1)
            writer.add_tensor(tensor, raw, raw_dtype=gguf.GGMLQuantizationType(FORMATS[format].ggml_type))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return write


class RawFile:
    """A GGUF file put together field by field, so that any field can be wrong."""

    def __init__(self) -> None:
        self.magic, self.version = b"GGUF", 3
        self.keys: list[bytes] = [self.key("general.architecture", 8, self.string("llama"))]
        self.tensors: list[bytes] = []
        self.num_keys: int | None = None
        self.num_tensors: int | None = None
        self.alignment = 32
        self.data = b""

    @staticmethod
    def string(text: str | bytes) -> bytes:
        raw = text.encode() if isinstance(text, str) else text
        return struct.pack("<Q", len(raw)) + raw

    @classmethod
    def key(cls, name: str | bytes, kind: int, value: bytes) -> bytes:
        return cls.string(name) + struct.pack("<I", kind) + value

    @classmethod
    def array(cls, kind: int, count: int, items: bytes) -> bytes:
        return struct.pack("<IQ", kind, count) + items

    def add_key(self, name: str | bytes, kind: int, value: bytes) -> "RawFile":
        self.keys.append(self.key(name, kind, value))
        return self

    def add_array(self, name: str, kind: int, count: int, items: bytes) -> "RawFile":
        return self.add_key(name, 9, self.array(kind, count, items))

    def replace_key(self, kind: int, value: bytes) -> None:
        self.keys = [self.key("general.architecture", kind, value)]

    def add_tensor(
        self, name: str | bytes = "t", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0
    ) -> "RawFile":
        """dims: as in the file, innermost first."""
        shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        self.tensors.append(self.string(name) + shape + struct.pack("<IQ", kind, offset))
        return self

    def header(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_keys = len(self.keys) if self.num_keys is None else self.num_keys
        counts = struct.pack("<IQQ", self.version, num_tensors, num_keys)
        return b"".join([self.magic, counts, *self.keys, *self.tensors])

    def __bytes__(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data


@pytest.fixture
def raw_file() -> RawFile:
    """A file without tensors, to be added to or broken."""
    return RawFile()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("HELEXA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"
