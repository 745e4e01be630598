"""Q3_K, 256 values in 110 bytes, 16 sub-blocks of 16 with a 6-bit scale s each.

32 bytes of third bits (bit b of byte i belongs to value 32·b + i), 64 bytes of bit pairs as in Q2_K, 12 bytes
of s, float16 d. Lower nibbles of s come first: byte i holds those of s[i] and s[8 + i]; in the last four
bytes pair r of byte i are the upper bits of s[4·r + i].   x = d·(s − 32)·(q − 4)
"""

import numpy as np

from helexa.quant.format import Bytes, Format, Values, half, nibbles
from helexa.quant.q2_k import bit_pairs


def decode(blocks: Bytes) -> Values:
    third = blocks[:, None, 0:32] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # [n, 8, 32]
    q = (bit_pairs(blocks[:, 32:96]) | third.reshape(-1, 256) << 2).astype(np.float32) - 4
    upper = blocks[:, None, 104:108] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3  # [n, 4, 4]
    s = (nibbles(blocks[:, 96:104]) | upper.reshape(-1, 16) << 4).astype(np.float32) - 32
    return ((half(blocks, 108) * s)[:, :, None] * q.reshape(-1, 16, 16)).reshape(-1, 256)


FORMAT = Format("q3_k", ggml_type=11, block_size=256, block_bytes=110, decode=decode)
