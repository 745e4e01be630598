"""Q6_K, 256 values in 210 bytes: 128 bytes of nibbles, 64 of upper bit pairs, 16 x int8 s, then float16 d.

Either half of a block (128 values, four runs of 32) has 64 nibble bytes and 32 pair bytes. Low nibbles hold
runs 0 and 1, high ones runs 2 and 3; bit pair r of pair byte i belongs to value i of run r. Each s serves 16
consecutive values.   x = d·s·(q − 32)
"""

import numpy as np

from helexa.quant.format import Bytes, Format, Values, half, nibbles


def decode(blocks: Bytes) -> Values:
    low = nibbles(blocks[:, 0:128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    pairs = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    q = (low | pairs << 4).astype(np.float32).reshape(-1, 16, 16) - 32
    s = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return ((half(blocks, 208) * s)[:, :, None] * q).reshape(-1, 256)


FORMAT = Format("q6_k", ggml_type=14, block_size=256, block_bytes=210, decode=decode)
