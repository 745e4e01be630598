"""IQ4_NL, 32 values in 18 bytes: float16 d, 16 bytes of nibbles q, laid out as in Q4_0.   x = d·LEVELS[q]"""

import numpy as np

from helexa.quant.format import Bytes, Format, Values, half, nibbles

LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)  # denser around zero, as weights are


def decode(blocks: Bytes) -> Values:
    return half(blocks, 0) * LEVELS[nibbles(blocks[:, 2:18])]


FORMAT = Format("iq4_nl", ggml_type=20, block_size=32, block_bytes=18, decode=decode)
