"""Q8_0, 32 values in 34 bytes: float16 d, 32 x int8 q.   x = d·q"""

import numpy as np

from helexa.quant.format import Bytes, Format, Values, half


def decode(blocks: Bytes) -> Values:
    q = blocks[:, 2:34].view(np.int8).astype(np.float32)
    return half(blocks, 0) * q


FORMAT = Format("q8_0", ggml_type=8, block_size=32, block_bytes=34, decode=decode)
