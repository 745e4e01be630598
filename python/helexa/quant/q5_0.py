"""Q5_0, 32 values in 22 bytes: float16 d, 32 fifth bits of q, 16 bytes of nibbles.  x = d·(q − 16)"""

import numpy as np

from helexa.quant.format import Bytes, Format, Values, half, high_bits, nibbles


def decode(blocks: Bytes) -> Values:
    q = (nibbles(blocks[:, 6:22]) | high_bits(blocks[:, 2:6])).astype(np.float32)
    return half(blocks, 0) * (q - 16)


FORMAT = Format("q5_0", ggml_type=6, block_size=32, block_bytes=22, decode=decode)
