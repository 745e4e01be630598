"""Q4_0, 32 values in 18 bytes: float16 d, 16 bytes of nibbles q.   x = d·(q − 8)

The low nibbles hold values 0..15, the high ones 16..31; so in all formats with blocks of 32.
"""

import numpy as np

from helexa.quant.format import Bytes, Format, Values, half, nibbles


def decode(blocks: Bytes) -> Values:
    q = nibbles(blocks[:, 2:18]).astype(np.float32)
    return half(blocks, 0) * (q - 8)


FORMAT = Format("q4_0", ggml_type=2, block_size=32, block_bytes=18, decode=decode)
