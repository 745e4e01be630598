"""Q2_K, 256 values in 84 bytes, 16 sub-blocks of 16 with a 4-bit scale s and minimum m each.

16 bytes with s in the low and m in the high nibble, 64 bytes of bit pairs q, float16 d, float16 dmin.
x = d·s·q − dmin·m
"""

import numpy as np

from helexa.quant.format import Bytes, Format, Values, half


def bit_pairs(packed: Bytes) -> Bytes:
    """[n, 64] bytes as [n, 256] numbers 0..3: either half of 32 bytes holds four runs of 32, pair r of a byte
    belonging to run r."""
    pairs = packed.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & np.uint8(3)
    return pairs.reshape(-1, 256)


def decode(blocks: Bytes) -> Values:
    s = (blocks[:, 0:16] & 15).astype(np.float32)
    m = (blocks[:, 0:16] >> 4).astype(np.float32)
    q = bit_pairs(blocks[:, 16:80]).astype(np.float32).reshape(-1, 16, 16)
    x = (half(blocks, 80) * s)[:, :, None] * q - (half(blocks, 82) * m)[:, :, None]
    return x.reshape(-1, 256)


FORMAT = Format("q2_k", ggml_type=10, block_size=256, block_bytes=84, decode=decode)
