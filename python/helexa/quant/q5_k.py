"""Q5_K, 256 values in 176 bytes: Q4_K with 32 bytes of fifth bits between its scales and its nibbles.

Bit b of fifth-bit byte i belongs to value i of sub-block b.   x = d·s·q − dmin·m
"""

import numpy as np

from helexa.quant.format import Bytes, Format, Values, half, nibbles
from helexa.quant.q4_k import scales_and_minimums


def decode(blocks: Bytes) -> Values:
    s, m = scales_and_minimums(blocks[:, 4:16])
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # [n, 8, 32]
    low = nibbles(blocks[:, 48:176].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    q = (low | fifth << 4).astype(np.float32)
    x = (half(blocks, 0) * s)[:, :, None] * q - (half(blocks, 2) * m)[:, :, None]
    return x.reshape(-1, 256)


FORMAT = Format("q5_k", ggml_type=13, block_size=256, block_bytes=176, decode=decode)
