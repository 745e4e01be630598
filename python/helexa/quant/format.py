"""What helexa knows of one tensor format, and the readers of bit fields that several formats share."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class Format:
    """A block format of GGUF files: `block_size` values of one row are stored in `block_bytes` bytes.

    `decode` turns blocks, uint8 [n, block_bytes], into their exact values, float32 [n, block_size]. It is the
    definition that the kernels are held to, not a fast path.
    """

    name: str
    ggml_type: int
    block_size: int
    block_bytes: int
    decode: Callable[[Bytes], Values]

    def nbytes(self, num_values: int) -> int:
        """Bytes of `num_values` values; ValueError unless they fill whole blocks."""
        if num_values % self.block_size:
            raise ValueError(f"{self.name}: {num_values} values are not whole blocks of {self.block_size}")
        return num_values // self.block_size * self.block_bytes

    def dequantize(self, raw: bytes | memoryview | Bytes) -> Values:
        """The values of contiguous blocks, float32 [n * block_size]; ValueError for a part of a block."""
        flat = np.frombuffer(raw, np.uint8)
        if flat.size % self.block_bytes:
            raise ValueError(f"{self.name}: {flat.size} bytes are not whole blocks of {self.block_bytes}")
        with np.errstate(all="ignore"):  # infinite and NaN scales decode to what they mean
            return self.decode(flat.reshape(-1, self.block_bytes)).reshape(-1)


def half(blocks: Bytes, offset: int) -> Values:
    """The little-endian float16 at byte `offset` of each block, float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2").astype(np.float32)


def nibbles(packed: Bytes) -> Bytes:
    """[..., m] bytes as [..., 2m] numbers 0..15: all low nibbles, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def high_bits(packed: Bytes) -> Bytes:
    """[n, 4] bytes as the fifth bits of 32 numbers, each 0 or 16: bit i of the word belongs to number i."""
    return np.unpackbits(packed, axis=-1, bitorder="little") * np.uint8(16)
