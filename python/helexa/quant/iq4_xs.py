"""IQ4_XS, 256 values in 136 bytes, 8 sub-blocks of 32 with a 6-bit scale s each.

float16 d, 8 upper bit pairs of s in a 16-bit word, 8 lower nibbles of s in 4 bytes (even sub-blocks low), and
for each sub-block 16 bytes of nibbles q, laid out as in Q4_0.   x = d·(s − 32)·LEVELS[q]
"""

import numpy as np

from helexa.quant.format import Bytes, Format, Values, half, nibbles
from helexa.quant.iq4_nl import LEVELS


def decode(blocks: Bytes) -> Values:
    low = blocks[:, 4:8, None] >> np.array([0, 4], np.uint8) & 15  # [n, 4, 2]
    high = blocks[:, 2:4, None] >> np.array([0, 2, 4, 6], np.uint8) & 3  # [n, 2, 4]
    s = (low.reshape(-1, 8) | high.reshape(-1, 8) << 4).astype(np.float32) - 32
    q = nibbles(blocks[:, 8:136].reshape(-1, 8, 16))
    return ((half(blocks, 0) * s)[:, :, None] * LEVELS[q]).reshape(-1, 256)


FORMAT = Format("iq4_xs", ggml_type=23, block_size=256, block_bytes=136, decode=decode)
