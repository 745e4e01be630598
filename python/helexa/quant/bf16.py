"""BF16: the upper half of a single precision number, little endian."""

import numpy as np

from helexa.quant.format import Bytes, Format, Values


def decode(blocks: Bytes) -> Values:
    upper = np.ascontiguousarray(blocks).view("<u2").astype(np.uint32)
    return (upper << 16).view(np.float32)


FORMAT = Format("bf16", ggml_type=30, block_size=1, block_bytes=2, decode=decode)
