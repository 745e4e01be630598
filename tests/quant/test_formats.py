"""Every format's reference decode against the `gguf` package's, bit for bit."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from helexa.quant import FORMATS, Format

BLOCKS = 257

# Float16 fields that a decoder could get wrong: both zeros, subnormals, the smallest and largest normal, one.
HALVES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00, 0xBC00]
HALF_OFFSETS = {
    "q8_0": [0], "q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q5_1": [0, 2],
    "q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208], "f16": [0],
    "q2_k": [80, 82], "q3_k": [108], "iq4_nl": [0], "iq4_xs": [0],
}  # fmt: skip


@pytest.fixture(params=FORMATS.values(), ids=lambda fmt: fmt.name)
def fmt(request: pytest.FixtureRequest) -> Format:
    return request.param


def random_blocks(fmt: Format, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (BLOCKS, fmt.block_bytes), np.uint8)


def assert_decodes_like_gguf(fmt: Format, blocks: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        expected = dequantize(blocks, gguf.GGMLQuantizationType(fmt.ggml_type)).reshape(len(blocks), -1)
        values = fmt.decode(blocks)
    assert values.dtype == np.float32
    assert values.shape == (len(blocks), fmt.block_size)
    bits, expected_bits = values.view(np.uint32), np.ascontiguousarray(expected, np.float32).view(np.uint32)
    same = (bits == expected_bits) | (np.isnan(values) & np.isnan(expected))
    assert same.all(), f"first difference at {np.argwhere(~same)[0]}"


def with_halves(fmt: Format, blocks: np.ndarray) -> np.ndarray:
    blocks = blocks.copy()
    for step, offset in enumerate(HALF_OFFSETS.get(fmt.name, [])):
        fields = np.array([HALVES[(i * (step + 1) + step) % len(HALVES)] for i in range(len(blocks))], "<u2")
        blocks[:, offset : offset + 2] = fields.view(np.uint8).reshape(-1, 2)
    return blocks


def test_names_types_and_sizes_are_those_of_the_file_format(fmt):
    kind = gguf.GGMLQuantizationType(fmt.ggml_type)
    assert kind.name.lower() == fmt.name
    assert gguf.GGML_QUANT_SIZES[kind] == (fmt.block_size, fmt.block_bytes)


def test_random_blocks_decode_like_gguf(fmt):
    assert_decodes_like_gguf(fmt, random_blocks(fmt))


def test_random_codes_under_extreme_scales_decode_like_gguf(fmt):
    assert_decodes_like_gguf(fmt, with_halves(fmt, random_blocks(fmt, seed=1)))


@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x0F, 0xF0, 0x7F, 0x80, 0x55, 0xAA])
def test_uniform_codes_under_extreme_scales_decode_like_gguf(fmt, byte):
    blocks = np.full((BLOCKS, fmt.block_bytes), byte, np.uint8)
    assert_decodes_like_gguf(fmt, blocks)
    assert_decodes_like_gguf(fmt, with_halves(fmt, blocks))


def test_every_single_bit_of_a_block_decodes_like_gguf(fmt):
    bits = fmt.block_bytes * 8
    blocks = np.packbits(np.eye(bits, dtype=np.uint8), axis=1, bitorder="little")
    assert_decodes_like_gguf(fmt, blocks)
    for offset in HALF_OFFSETS.get(fmt.name, []):
        blocks[:, offset : offset + 2] = np.array([0x00, 0x3C], np.uint8)
    assert_decodes_like_gguf(fmt, blocks)


@pytest.mark.parametrize(
    "name", [name for name in FORMATS if not name.endswith("_k") and not name.startswith("iq")]
)  # gguf writes none of these
def test_what_gguf_quantizes_decodes_close_to_the_original(name):
    fmt = FORMATS[name]
    kind = gguf.GGMLQuantizationType(fmt.ggml_type)
    data = np.random.default_rng(2).standard_normal((BLOCKS, 256), np.float32)
    blocks = gguf.quants.quantize(data, kind).view(np.uint8).reshape(-1, fmt.block_bytes)
    assert_decodes_like_gguf(fmt, blocks)
    tolerance = {"f32": 0, "f16": 2e-3, "bf16": 2e-2, "q8_0": 2e-2}.get(fmt.name, 0.5)
    np.testing.assert_allclose(fmt.dequantize(blocks), data.reshape(-1), atol=tolerance)


def test_strided_and_read_only_blocks_are_accepted(fmt):
    wide = np.random.default_rng(3).integers(0, 256, (BLOCKS, fmt.block_bytes + 7), np.uint8)
    wide.setflags(write=False)
    assert_decodes_like_gguf(fmt, wide[:, 3 : 3 + fmt.block_bytes])


def test_no_blocks_decode_to_no_values(fmt):
    assert fmt.decode(np.empty((0, fmt.block_bytes), np.uint8)).shape == (0, fmt.block_size)
    assert fmt.dequantize(b"").shape == (0,)


def test_bytes_that_are_not_whole_blocks_are_refused(fmt):
    if fmt.block_bytes > 1:
        with pytest.raises(ValueError, match=f"{fmt.name}: {fmt.block_bytes + 1} bytes are not whole blocks"):
            fmt.dequantize(bytes(fmt.block_bytes + 1))
    if fmt.block_size > 1:
        with pytest.raises(ValueError, match=f"{fmt.name}: 33 values are not whole blocks"):
            fmt.nbytes(33)
    assert fmt.nbytes(512) == 512 // fmt.block_size * fmt.block_bytes
