import numpy as np
import pytest
import torch

from helexa import ops
from helexa.quant import FORMATS
from support.random_weights import QUANTIZED, decoded, random_raw


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 48])
@pytest.mark.parametrize("format", FORMATS)
def test_packed_weights_decode_to_the_files_values_bit_for_bit(format: str, rows: int) -> None:
    cols = 512
    raw = random_raw(format, rows, cols, seed=rows)
    weight = ops.pack_weight(format, raw, rows, cols)
    assert torch.equal(weight.dequantize(), decoded(format, raw, rows, cols))


@pytest.mark.parametrize("format", FORMATS)
def test_packed_weights_take_the_files_bytes(format: str) -> None:
    layout = FORMATS[format]
    assert ops.packed_nbytes(format, 48, 512) == 48 * layout.nbytes(512)


@pytest.mark.parametrize("format", QUANTIZED)
def test_random_bytes_decode_bit_for_bit_with_infinite_and_subnormal_scales(format: str) -> None:
    rng = np.random.default_rng(3)
    layout = FORMATS[format]
    blocks = rng.integers(0, 256, (32 * 2, layout.block_bytes), dtype=np.uint8)
    raw = blocks.reshape(32, -1)
    cols = 2 * layout.block_size
    with np.errstate(all="ignore"):
        expected = decoded(format, raw, 32, cols)
    actual = ops.pack_weight(format, raw, 32, cols).dequantize()
    assert torch.equal(expected.isnan(), actual.isnan())
    assert torch.equal(expected.nan_to_num(), actual.nan_to_num())


@pytest.mark.parametrize("format", ["q8_0", "q4_k", "f16"])
def test_slices_in_any_order_equal_the_whole(format: str) -> None:
    rows, cols = 75, 256
    raw = random_raw(format, rows, cols)
    whole = ops.pack_weight(format, raw, rows, cols)
    sliced = ops.empty_packed(format, rows, cols)
    for first, last in ((64, 75), (0, 32), (32, 64)):
        ops.pack_rows(format, raw[first:last].copy(), first, last - first, sliced)
    assert torch.equal(whole.data, sliced.data)


def test_sizes_that_do_not_fit_are_refused() -> None:
    raw = random_raw("q8_0", 16, 64)
    with pytest.raises(ValueError, match="no multiple of the 256 columns"):
        ops.packed_nbytes("q4_k", 16, 64)
    with pytest.raises(ValueError, match="not one of"):
        ops.packed_nbytes("q9_9", 16, 64)
    with pytest.raises(ValueError, match="take 2176 bytes"):
        ops.pack_weight("q8_0", raw.ravel()[:-1].copy(), 32, 64)
    weight = ops.empty_packed("q8_0", 16, 64)
    with pytest.raises(ValueError, match="multiple of 16"):
        ops.pack_rows("q8_0", raw[:8].copy(), 8, 8, weight)
    with pytest.raises(ValueError, match="beyond"):
        ops.pack_rows("q8_0", raw, 16, 16, weight)


def test_weights_of_one_arena_lie_apart_and_outlive_it() -> None:
    arena = ops.WeightArena()
    raws = [random_raw("q8_0", 48, 64, seed) for seed in range(3)]
    weights = [ops.empty_packed("q8_0", 48, 64, arena) for _ in raws]
    del arena
    for raw, weight in zip(raws, weights, strict=True):
        ops.pack_rows("q8_0", raw, 0, 48, weight)
    for raw, weight in zip(raws, weights, strict=True):
        assert torch.equal(weight.dequantize(), decoded("q8_0", raw, 48, 64))
