"""Q4_1, 32 values in 20 bytes: float16 d, float16 m, 16 bytes of nibbles q.   x = d·q + m"""

import numpy as np

from helexa.quant.format import Bytes, Format, Values, half, nibbles


def decode(blocks: Bytes) -> Values:
    q = nibbles(blocks[:, 4:20]).astype(np.float32)
    return half(blocks, 0) * q + half(blocks, 2)


FORMAT = Format("q4_1", ggml_type=3, block_size=32, block_bytes=20, decode=decode)
