"""F16: IEEE half precision, little endian."""

from helexa.quant.format import Bytes, Format, Values, half


def decode(blocks: Bytes) -> Values:
    return half(blocks, 0)


FORMAT = Format("f16", ggml_type=1, block_size=1, block_bytes=2, decode=decode)
