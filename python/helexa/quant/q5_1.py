"""Q5_1, 32 values in 24 bytes: float16 d, float16 m, 32 fifth bits of q, 16 bytes of nibbles.  x = d·q + m"""

import numpy as np

from helexa.quant.format import Bytes, Format, Values, half, high_bits, nibbles


def decode(blocks: Bytes) -> Values:
    q = (nibbles(blocks[:, 8:24]) | high_bits(blocks[:, 4:8])).astype(np.float32)
    return half(blocks, 0) * q + half(blocks, 2)


FORMAT = Format("q5_1", ggml_type=7, block_size=32, block_bytes=24, decode=decode)
