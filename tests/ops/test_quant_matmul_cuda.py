"""Products of few rows on a CUDA device."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helexa import ops
from helexa.ops import PackedWeight, Rows
from helexa.ops.quant_matmul import quantize_input_reference
from helexa.quant import FORMATS
from support.products import LARGEST_CODES, error
from support.random_weights import random_raw

pytestmark = pytest.mark.cuda

BLOCKS_OF_32 = [name for name in FORMATS if FORMATS[name].block_size == 32]


@pytest.fixture
def rows_of(cuda_device: str) -> Callable[..., Tensor]:
    def rows(num_rows: int, cols: int) -> Tensor:
        return (torch.randn(num_rows, cols) * torch.rand(num_rows, 1) * 3).to(cuda_device)

    return rows


def only_q8(x: Tensor) -> ops.Activation:
    """x as a producer on the device hands it over."""
    return ops.Activation(x.shape[1], q8=ops.quantize_rows(x).q8)


def unfinished(x: Tensor, keep_float: bool = True) -> tuple[ops.Activation, Tensor]:
    """x as rows whose norm is not finished, and their norm."""
    eps = 1e-2
    weight = torch.linspace(0.5, 1.5, x.shape[1], device=x.device)
    rows = ops.quantize_rows(x * weight)
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 128)).unflatten(1, (-1, 32))
    rows.squares, rows.eps = padded.square().sum(2), eps
    if not keep_float:
        rows.x = None
    return rows, ops.rms_norm_reference(x, weight, eps)


def run(x: Rows, weights: list[PackedWeight], biases: list[Tensor | None] | None = None) -> Tensor:
    """The product, in memory that was NaN before."""
    rows = x.num_rows if isinstance(x, ops.Activation) else x.shape[0]
    shape = (rows, sum(weight.rows for weight in weights))
    out = torch.full(shape, float("nan"), device=weights[0].data.device)
    return ops.quant_matmul(x, weights, biases, out=out)


@pytest.mark.parametrize("num_rows", [1, 2, 4, 7, 8, 13, 16])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_equals_the_reference(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor], format: str, num_rows: int
) -> None:
    weight = make(format, 16 * 2 + 5, 768, seed=num_rows)
    x = rows_of(num_rows, 768)
    assert error(run(x, [weight]), ops.quant_matmul_reference(x, [weight])) < 2e-5


@pytest.mark.parametrize("cols", [32, 96, 256, 320, 544, 2336])
@pytest.mark.parametrize("format", BLOCKS_OF_32)
def test_widths_that_are_no_whole_chunk_equal_the_reference(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor], format: str, cols: int
) -> None:
    weight = make(format, 23, cols)
    for num_rows in (1, 3, 6):
        x = rows_of(num_rows, cols)
        assert error(run(x, [weight]), ops.quant_matmul_reference(x, [weight])) < 2e-5


@pytest.mark.parametrize("num_rows", [1, 2, 8, 15])
@pytest.mark.parametrize("cols", [256, 1280, 2304, 4864])
def test_long_rows_go_round_the_ring(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor], cols: int, num_rows: int
) -> None:
    weights = [make("q4_k", 16, cols), make("q6_k", 17, cols)]
    x = rows_of(num_rows, cols)
    assert error(run(x, weights), ops.quant_matmul_reference(x, weights)) < 2e-5


@pytest.mark.parametrize("num_rows", [1, 6])
def test_blocks_that_take_several_tiles_equal_the_reference(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor], num_rows: int
) -> None:
    weights = [make("q4_k", 16 * 7, 768), make("q8_0", 16 * 85 + 3, 768), make("q5_0", 16 * 25, 768)]
    x = rows_of(num_rows, 768)
    assert error(run(x, weights), ops.quant_matmul_reference(x, weights)) < 2e-5


@pytest.mark.parametrize("num_rows", [1, 5, 14])
def test_mixed_formats_and_biases_lie_side_by_side(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor], num_rows: int
) -> None:
    formats = {"q4_k": 33, "q6_k": 16, "f32": 7, "q5_0": 90, "bf16": 20}
    weights = [make(format, rows, 512, rows) for format, rows in formats.items()]
    x = rows_of(num_rows, 512)
    biases = [torch.randn(33), None, torch.randn(7), torch.randn(90), None]
    biases = [None if bias is None else bias.to(x.device) for bias in biases]
    assert error(run(x, weights, biases), ops.quant_matmul_reference(x, weights, biases)) < 2e-5


@pytest.mark.parametrize("format", ["f32", "f16", "bf16"])
def test_float_weights_see_the_rounded_input_where_there_is_no_other(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor], format: str
) -> None:
    for cols in (256, 36):
        weight, x = make(format, 21, cols), rows_of(3, cols)
        seen = quantize_input_reference(torch.nn.functional.pad(x.cpu(), (0, -cols % 32)))[:, :cols]
        truth = (seen @ weight.dequantize().cpu().double().T).float()
        assert error(run(only_q8(x), [weight]).cpu(), truth) < 2e-5
        assert error(run(x, [weight]).cpu(), truth) > 1e-4


@pytest.mark.parametrize("num_rows", [1, 2, 4, 8, 9, 16])
@pytest.mark.parametrize("format", FORMATS)
def test_the_gated_product_is_the_quantized_input_of_the_next_one(
    make: Callable[..., PackedWeight],
    rows_of: Callable[..., Tensor],
    decoded: Callable[[Rows], Tensor],
    format: str,
    num_rows: int,
) -> None:
    if num_rows > 9 and format not in ("q4_k", "q8_0"):
        pytest.skip("the tiles of rows do not depend on the format")
    weights = [make(format, 80, 256, 1), make("q6_k", 80, 256, 2)]
    x = rows_of(num_rows, 256)
    plain = ops.silu_mul_reference(ops.quant_matmul_reference(x, weights))
    result = ops.gated_matmul(x, weights)
    assert isinstance(result, ops.Activation)
    assert result.cols == 80
    most = torch.nn.functional.pad(plain, (0, 16)).unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True)
    difference = torch.nn.functional.pad((decoded(result) - plain).abs(), (0, 16)).unflatten(1, (-1, 32))
    assert (difference <= most * (0.5 / 127 + 1e-4)).all()


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8, 9, 16])
@pytest.mark.parametrize("cols", [64, 256, 544, 4608])
def test_products_of_a_norm_that_is_not_finished_equal_those_of_the_norm(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor], cols: int, num_rows: int
) -> None:
    weights = [make("q5_0", 37, cols), make("f16", 7, cols), make("q8_0", 16, cols)]
    x, bias = rows_of(num_rows, cols), torch.randn(37)
    biases = [bias.to(x.device), None, None]
    rows, normed = unfinished(x)
    truth = ops.quant_matmul_reference(normed, weights, biases)
    assert error(run(rows, weights, biases), truth) < 1e-3  # a code may be rounded to the other side
    assert error(run(ops.Activation(cols, rows.q8, x=rows.x), weights, biases), truth) > 0.1
    rounded = ops.Activation(cols, rows.q8, squares=rows.squares, eps=rows.eps)
    assert error(run(rounded, weights[1:2]), truth[:, 37:44]) < 4e-2
    assert error(rounded.values(), normed) < 4e-2
    assert torch.allclose(ops.as_float(rows), normed, rtol=1e-5)
    for first, last in ((0, 1), (num_rows // 2, num_rows)):
        assert torch.equal(run(rows[first:last], weights, biases), run(rows, weights, biases)[first:last])


@pytest.mark.parametrize("num_rows", [1, 3, 8, 14])
@pytest.mark.parametrize(("first", "second"), [("q4_k", "q6_k"), ("f32", "f32"), ("q5_0", "q5_0")])
def test_the_gated_product_of_a_norm_that_is_not_finished_equals_that_of_the_norm(
    make: Callable[..., PackedWeight],
    rows_of: Callable[..., Tensor],
    decoded: Callable[[Rows], Tensor],
    first: str,
    second: str,
    num_rows: int,
) -> None:
    weights = [make(first, 80, 512, 1), make(second, 80, 512, 2)]
    biases = [torch.randn(80), torch.randn(80)]
    rows, normed = unfinished(rows_of(num_rows, 512), keep_float=False)
    biases = [bias.to(normed.device) for bias in biases]
    truth = ops.silu_mul_reference(ops.quant_matmul_reference(normed, weights, biases))
    assert error(decoded(ops.gated_matmul(rows, weights, biases)), truth) < 0.1
    rows.eps = 100.0
    assert error(decoded(ops.gated_matmul(rows, weights, biases)), truth) > 1.0


def test_a_gated_product_of_many_rows_equals_the_reference(
    make: Callable[..., PackedWeight],
    rows_of: Callable[..., Tensor],
    decoded: Callable[[Rows], Tensor],
    assert_close: Callable[[str, Tensor, Tensor, float], None],
) -> None:
    weights = [make("q4_k", 64, 256, 1), make("q4_k", 64, 256, 2)]
    x = rows_of(70, 256)
    truth = ops.silu_mul_reference(x @ torch.cat([w.dequantize() for w in weights]).T)
    assert_close("gated", truth, decoded(ops.gated_matmul(x, weights)), 0.02)


def test_a_row_does_not_depend_on_its_neighbours_in_the_batch(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor]
) -> None:
    """Bit for bit, whichever kernel the number of rows takes."""
    weights = [
        make("q4_k", 32, 2560),
        make("q6_k", 20, 2560),
        make("q2_k", 16, 2560),
        make("q8_0", 16, 2560),
        make("f16", 5, 2560),
    ]
    x = rows_of(16, 2560)
    together = run(x, weights)
    for first, last in ((0, 1), (15, 16), (3, 5), (7, 11), (8, 15), (3, 12), (1, 16)):
        assert torch.equal(run(x[first:last].contiguous(), weights), together[first:last])


@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("format", LARGEST_CODES)
def test_extreme_codes_do_not_overflow(cuda_device: str, format: str, top: bool) -> None:
    layout = FORMATS[format]
    codes, byte = LARGEST_CODES[format]
    blocks = random_raw(format, 16, 512).reshape(-1, layout.block_bytes).copy()
    blocks[:, codes] = byte if not top else 0x80 if format == "q8_0" else byte ^ 0xFF
    weight = ops.pack_weight(format, blocks.reshape(16, -1), 16, 512, cuda_device)
    for sign in (1.0, -1.0):
        for num_rows in (1, 8):
            x = torch.full((num_rows, 512), sign, device=cuda_device)
            assert error(run(x, [weight]), ops.quant_matmul_reference(x, [weight])) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cols", [32, 36, 256, 1000])
def test_rows_are_quantized_like_on_the_cpu(
    cuda_device: str, decoded: Callable[[Rows], Tensor], cols: int, dtype: torch.dtype
) -> None:
    x = torch.randn(5, cols, device=cuda_device).to(dtype)
    padded = torch.nn.functional.pad(x.float(), (0, -cols % 32))
    rows = ops.quantize_rows(x)
    truth = quantize_input_reference(padded)[:, :cols].float()
    assert torch.allclose(decoded(rows), truth, rtol=1e-6, atol=0)
    assert torch.equal(rows.values(), decoded(rows))


def test_nan_and_infinity_in_the_input_reach_the_output(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor]
) -> None:
    weight = make("q4_0", 16, 64)
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = rows_of(2, 64)
        x[1, 40] = bad
        y = run(only_q8(x), [weight])
        assert y[0].isfinite().all()
        assert not y[1].isfinite().any()


def test_zero_and_tiny_inputs_give_zero_and_no_nan(
    make: Callable[..., PackedWeight], cuda_device: str
) -> None:
    weight = make("q8_0", 32, 64)
    zeros = torch.zeros(2, 64, device=cuda_device)
    assert torch.equal(run(zeros, [weight]), torch.zeros(2, 32, device=cuda_device))
    assert run(zeros + 1e-38, [weight]).isfinite().all()


def test_a_slice_of_many_rows_is_multiplied_like_few(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor]
) -> None:
    weight, x = make("q5_k", 16, 256), rows_of(80, 256)
    many = ops.quantize_rows(x)
    assert many.bf16 is not None
    few = run(many[10:12], [weight])
    assert torch.equal(few, run(only_q8(many.bf16[10:12]), [weight]))


def test_a_neighbouring_scale_would_be_noticed(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor]
) -> None:
    """The tolerance of these tests is small against the least mistake in a layout."""
    weight, x = make("q4_k", 16, 512), rows_of(4, 512)
    truth = ops.quant_matmul_reference(x, [weight])
    shifted = ops.quant_matmul_reference(x.roll(32, 1), [weight])
    assert error(shifted, truth) > 1e-2


def test_captured_equals_eager_for_new_values(
    make: Callable[..., PackedWeight],
    rows_of: Callable[..., Tensor],
    cuda_capture: Callable[..., tuple[Callable[[], None], Tensor]],
) -> None:
    up, down = [make("q4_k", 512, 256), make("q5_k", 512, 256)], [make("q6_k", 256, 512)]
    x = rows_of(3, 256)
    replay, y = cuda_capture(lambda: ops.quant_matmul(ops.gated_matmul(x, up), down))
    for _ in range(3):
        x.copy_(rows_of(3, 256))
        replay()
        assert torch.equal(y, ops.quant_matmul(ops.gated_matmul(x, up), down))


def test_what_does_not_fit_is_refused(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor]
) -> None:
    weight = make("q8_0", 16, 64)
    with pytest.raises(ValueError, match="does not fit"):
        ops.quant_matmul(rows_of(2, 96), [weight])
    with pytest.raises(ValueError, match="float32"):
        ops.quant_matmul(rows_of(2, 64).half(), [weight])
    with pytest.raises(ValueError, match="cannot make"):
        ops.quant_matmul(rows_of(2, 64), [weight], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="out"):
        ops.quant_matmul(rows_of(2, 64), [weight], out=rows_of(2, 15))
    with pytest.raises(ValueError, match="weights"):
        ops.quant_matmul(rows_of(2, 64), [weight] * 9)
    with pytest.raises(ValueError, match="as many rows"):
        ops.gated_matmul(rows_of(2, 64), [weight, make("q8_0", 32, 64)])
