import numpy as np
import pytest
import torch

from helexa import _C, ops
from helexa.ops.tensor import EMULATED
from helexa.quant import FORMATS

# Relative RMSE of llama.cpp's llama-quantize, --pure and without importances, on matrix(0), (1) and (2).
PEER_RMSE = {
    "q8_0": (0.005367, 0.008346, 0.004479),
    "q4_0": (0.086200, 0.127931, 0.070925),
    "q5_0": (0.042961, 0.065973, 0.035372),
    "q5_1": (0.038015, 0.049537, 0.021071),
    "q4_k": (0.071595, 0.095627, 0.039308),
    "q5_k": (0.036202, 0.048309, 0.019796),
    "q6_k": (0.017807, 0.025426, 0.014978),
}


def matrix(kind: int, rows: int = 64, cols: int = 512) -> np.ndarray:
    """Normal numbers; with heavy tails (1); off centre (2)."""
    rng = np.random.default_rng([11, kind])
    values = rng.standard_normal((rows, cols)) * 0.02
    if kind == 1:
        values *= np.exp(rng.standard_normal((rows, cols)) * 0.7)
    return (values + (0.03 if kind == 2 else 0)).astype(np.float32)


def decoded(format: str, blocks: np.ndarray) -> np.ndarray:
    return FORMATS[format].dequantize(blocks)


def relative_rmse(values: np.ndarray, format: str) -> float:
    exact = values.astype(np.float64).reshape(-1)
    missed = decoded(format, ops.quantize("f32", values, format)) - exact
    return float(np.sqrt((missed**2).mean() / (exact**2).mean()))


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("format", ops.ENCODED)
def test_the_error_is_within_two_per_cent_of_the_fields_or_less(format, kind):
    assert relative_rmse(matrix(kind), format) <= 1.02 * PEER_RMSE[format][kind]


@pytest.mark.parametrize("format", ops.ENCODED)
def test_every_instruction_set_finds_the_same_blocks(isa, format):
    values = matrix(1, 3, 768)  # ends in the middle of a pair of super-blocks
    blocks = ops.quantize("f32", values, format)
    _C.limit_isa(0)
    assert np.array_equal(blocks, ops.quantize("f32", values, format))


@pytest.mark.parametrize("format", ops.ENCODED)
def test_threads_find_the_blocks_of_the_serial_run(format):
    values = matrix(0, 150, 256)  # several runs, the last one short
    before = ops.num_threads()
    try:
        ops.set_num_threads(1)
        serial = ops.quantize("f32", values, format)
        ops.set_num_threads(5)
        assert np.array_equal(serial, ops.quantize("f32", values, format))
    finally:
        ops.set_num_threads(before)
    by_row = [ops.quantize("f32", row, format) for row in values]
    assert np.array_equal(serial, np.concatenate(by_row))


@pytest.mark.parametrize("format", ops.ENCODED)
def test_16_bit_numbers_give_the_blocks_of_their_values(format):
    values = matrix(0)
    half = values.astype(np.float16)
    assert np.array_equal(ops.quantize("f16", half, format), ops.quantize("f32", half.astype("f4"), format))
    upper = values.view(np.uint32) & 0xFFFF0000
    assert np.array_equal(
        ops.quantize("bf16", (upper >> 16).astype(np.uint16), format),
        ops.quantize("f32", upper.view(np.float32), format),
    )


@pytest.mark.parametrize("format", ops.ENCODED)
def test_what_a_format_can_hold_comes_back(format):
    """Values that were decoded from blocks lie on a grid that the search must find again, nearly."""
    once = decoded(format, ops.quantize("f32", matrix(0), format))
    again = decoded(format, ops.quantize("f32", once, format))
    first = relative_rmse(matrix(0), format)
    assert np.sqrt(((again - once) ** 2).mean() / (once**2).mean()) < first / 3


@pytest.mark.parametrize("value", [0.0, 0.01, -0.01, 1e-12, -1e-35, 30000.0, -30000.0])
@pytest.mark.parametrize("format", ops.ENCODED)
def test_equal_values_come_back_within_the_precision_of_a_half(format, value):
    back = decoded(format, ops.quantize("f32", np.full(512, value, np.float32), format))
    assert np.allclose(back, value, rtol=0.02, atol=2e-6)


@pytest.mark.parametrize("format", ops.ENCODED)
def test_one_outlier_does_not_drown_its_neighbours_of_other_blocks(format):
    values = matrix(0, 1, 1024)
    values[0, 100] = 5.0
    back = decoded(format, ops.quantize("f32", values, format)).reshape(1, -1)
    assert abs(back[0, 100] - 5.0) < 0.05
    far = slice(512, None)
    assert np.sqrt(((back - values)[0, far] ** 2).mean()) < 0.1 * np.sqrt((values[0, far] ** 2).mean())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("format", ops.ENCODED)
def test_numbers_that_no_block_can_hold_are_refused(format, bad):
    values = matrix(0, 2, 512)
    values[1, 300] = bad
    with pytest.raises(ValueError, match="1 values are not finite or too large"):
        ops.quantize("f32", values, format)


def test_unknown_formats_and_parts_of_blocks_are_refused():
    with pytest.raises(ValueError, match="no encoder for 'q4_1'"):
        ops.quantize("f32", matrix(0), "q4_1")
    with pytest.raises(ValueError, match="'q8_0' is not one of"):
        ops.quantize("q8_0", matrix(0), "q4_0")
    with pytest.raises(ValueError, match="whole blocks of 256"):
        ops.quantize("f32", np.zeros(128, np.float32), "q4_k")


def on_device(source_format: str, values: np.ndarray, format: str, device: str) -> np.ndarray:
    raw = torch.from_numpy(values.view(np.uint8).reshape(-1).copy()).to(device)
    return ops.quantize_on_device(source_format, raw, format).cpu().numpy()


HARD = {
    "normal": matrix(0, 3, 768),
    "heavy": matrix(1, 3, 768),
    "off centre": matrix(2, 3, 768),
    "large": matrix(1, 1, 512) * np.float32(1e6),
    "tiny": matrix(1, 1, 512) * np.float32(1e-29),
    "beneath": matrix(1, 1, 512) * np.float32(1e-38),
    "positive": abs(matrix(1, 1, 512)),
    "negative": -abs(matrix(1, 1, 512)),
    "zero": np.zeros((1, 512), np.float32),
    "constant": np.full((1, 512), 0.7, np.float32),
    "sparse": matrix(1, 1, 512) * (np.arange(512) % 37 == 0),
    "whole": np.arange(-256, 256, dtype=np.float32)[None],
}


@pytest.mark.cuda
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("format", ops.ENCODED)
def test_a_device_finds_the_same_blocks(cuda_device, format, kind):
    values = HARD[kind].astype(np.float32)
    assert np.array_equal(on_device("f32", values, format, cuda_device), ops.quantize("f32", values, format))


@pytest.mark.cuda
@pytest.mark.parametrize("format", ops.ENCODED)
def test_a_device_finds_the_same_blocks_of_16_bit_numbers(cuda_device, format):
    values = matrix(1, 5, 256)
    half, brain = values.astype(np.float16), (values.view(np.uint32) >> 16).astype(np.uint16)
    for name, numbers in (("f16", half), ("bf16", brain)):
        expected = ops.quantize(name, numbers, format)
        assert np.array_equal(on_device(name, numbers, format, cuda_device), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("format", ops.ENCODED)
def test_a_device_finds_the_same_blocks_of_a_large_matrix(cuda_device, format):
    values = matrix(1, 4 if EMULATED else 2048, 2048)
    assert np.array_equal(on_device("f32", values, format, cuda_device), ops.quantize("f32", values, format))


@pytest.mark.cuda
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 500001.0])
@pytest.mark.parametrize("format", ops.ENCODED)
def test_a_device_refuses_what_cannot_be_encoded(cuda_device, format, bad):
    values = matrix(0, 3, 256)
    values[1, 7] = values[2, 200] = bad
    with pytest.raises(ValueError, match=f"2 values are not finite or too large for {format}"):
        on_device("f32", values, format, cuda_device)
