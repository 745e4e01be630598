"""F32: IEEE single precision, little endian."""

import numpy as np

from helexa.quant.format import Bytes, Format, Values


def decode(blocks: Bytes) -> Values:
    return np.ascontiguousarray(blocks).view("<f4").astype(np.float32)


FORMAT = Format("f32", ggml_type=0, block_size=1, block_bytes=4, decode=decode)
