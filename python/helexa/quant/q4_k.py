"""Q4_K, 256 values in 144 bytes, 8 sub-blocks of 32 with a 6-bit scale s and minimum m each.

float16 d, float16 dmin, 12 bytes of s and m, 4 runs of 32 bytes: run j holds sub-block 2j in its low nibbles
and 2j+1 in its high ones.   x = d·s·q − dmin·m
"""

import numpy as np

from helexa.quant.format import Bytes, Format, Values, half, nibbles


def scales_and_minimums(packed: Bytes) -> tuple[Values, Values]:
    """[n, 12] bytes as s and m of 8 sub-blocks, float32 [n, 8] each.

    Bytes 0..3 hold s and bytes 4..7 m of sub-blocks 0..3 in their low six bits. Sub-blocks 4..7 have the low
    four bits of s and m in the low and high nibbles of bytes 8..11, the upper two on top of bytes 0..3, 4..7.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    s = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    m = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return s.astype(np.float32), m.astype(np.float32)


def decode(blocks: Bytes) -> Values:
    s, m = scales_and_minimums(blocks[:, 4:16])
    q = nibbles(blocks[:, 16:144].reshape(-1, 4, 32)).reshape(-1, 8, 32).astype(np.float32)
    x = (half(blocks, 0) * s)[:, :, None] * q - (half(blocks, 2) * m)[:, :, None]
    return x.reshape(-1, 256)


FORMAT = Format("q4_k", ggml_type=12, block_size=256, block_bytes=144, decode=decode)
