"""A product, the residual addition and the norm of the sum."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from helexa import ops
from helexa.ops import PackedWeight
from helexa.ops.tensor import on_cuda
from helexa.quant import FORMATS
from support.products import error
from support.random_weights import random_raw

Inputs = tuple[Tensor, PackedWeight, Tensor, Tensor, Tensor | None]
EPS = 1e-2


def inputs_on(
    device: str, format: str, num_tokens: int, rows: int, cols: int, *, with_bias: bool = False, seed: int = 0
) -> Inputs:
    """x, weight, residual, norm_weight and bias on the device."""
    weight = ops.pack_weight(format, random_raw(format, rows, cols, seed), rows, cols, device)
    x = (torch.randn(num_tokens, cols) * torch.rand(num_tokens, 1)).to(device)
    size = ops.quant_matmul_reference(x, [weight]).square().mean().sqrt()
    residual = 2 * size * torch.randn(num_tokens, rows, device=device)
    norm_weight = torch.linspace(0.5, 1.5, rows, device=device)
    return x, weight, residual, norm_weight, torch.randn(rows, device=device) if with_bias else None


@pytest.fixture
def make(device: str) -> Callable[..., Inputs]:
    return partial(inputs_on, device)


@pytest.fixture
def make_on_cuda(cuda_device: str) -> Callable[..., Inputs]:
    return partial(inputs_on, cuda_device)


def check(inputs: Inputs, *, keep_float: bool = True) -> ops.Rows:
    """Compares the result and the residual with the reference."""
    x, weight, residual, norm_weight, bias = inputs
    expected_residual, before = residual.clone(), residual.clone()
    expected = ops.matmul_add_norm_reference(x, weight, expected_residual, norm_weight, EPS, bias=bias)
    out = ops.matmul_add_norm(x, weight, residual, norm_weight, EPS, bias=bias, keep_float=keep_float)
    assert error(residual, expected_residual) < 2e-5
    assert error(ops.as_float(out), expected) < (2e-5 if keep_float else 5e-2)
    without = ops.rms_norm_reference(before, norm_weight, EPS)
    assert error(ops.as_float(out), without) > 0.1  # it would be noticed
    return out


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_equals_the_reference(make: Callable[..., Inputs], format: str) -> None:
    for num_tokens in (1, 3, 6):
        check(make(format, num_tokens, 80, 512, with_bias=num_tokens == 3, seed=num_tokens))


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 5, 8, 9, 16, 17])
@pytest.mark.parametrize(
    ("rows", "cols"), [(5, 32), (37, 96), (48, 2304), (128, 1056), (288, 4608), (160, 544)]
)
def test_every_shape_equals_the_reference(
    make: Callable[..., Inputs], rows: int, cols: int, num_tokens: int
) -> None:
    inputs = make("q8_0", num_tokens, rows, cols, with_bias=True)
    x, weight, residual, norm_weight, bias = inputs
    if num_tokens <= ops.MAX_MATVEC_ROWS or not on_cuda(x):
        check(inputs)
        return
    expected = ops.matmul_add_norm_reference(x, weight, residual.clone(), norm_weight, EPS, bias=bias)
    out = ops.matmul_add_norm(x, weight, residual, norm_weight, EPS, bias=bias)
    assert error(ops.as_float(out), expected) < 0.1  # in bfloat16


@pytest.mark.cuda
@pytest.mark.parametrize("format", ["q4_k", "q5_0", "bf16"])
@pytest.mark.parametrize("num_tokens", [1, 4, 7, 16])
def test_codes_and_squares_are_those_of_the_sum(
    make_on_cuda: Callable[..., Inputs], num_tokens: int, format: str
) -> None:
    """In memory that was NaN before; columns that fill up a row are zeros."""
    x, weight, residual, norm_weight, _ = make_on_cuda(format, num_tokens, 80, 768)
    _poison_what_is_freed(residual.device, num_tokens, 80)
    out = ops.matmul_add_norm(x, weight, residual, norm_weight, EPS, keep_float=True)
    assert isinstance(out, ops.Activation)
    assert out.q8 is not None
    assert out.x is not None
    assert out.squares is not None
    assert torch.equal(out.x, residual * norm_weight)
    assert torch.equal(out.q8, ops.quantize_rows(out.x).q8)
    squares = torch.nn.functional.pad(residual, (0, 48)).square().unflatten(1, (-1, 32)).sum(2)
    assert torch.allclose(out.squares, squares, rtol=1e-5, atol=0)
    assert (out.squares[:, 3] == 0).all()


@pytest.mark.cuda
@pytest.mark.parametrize("format", ["q4_k", "q6_k", "q8_0", "f16"])
@pytest.mark.parametrize(("rows", "cols"), [(32, 2560), (160, 512)])
def test_a_row_does_not_depend_on_its_neighbours_in_the_batch(
    make_on_cuda: Callable[..., Inputs], rows: int, cols: int, format: str
) -> None:
    """Bit for bit, through the next product."""
    x, weight, residual, norm_weight, _ = make_on_cuda(format, 16, rows, cols)
    following = ops.pack_weight("q8_0", random_raw("q8_0", 48, rows, 1), 48, rows, x.device)

    def run(first: int, last: int) -> tuple[Tensor, Tensor]:
        part = residual[first:last].clone()
        normed = ops.matmul_add_norm(x[first:last].contiguous(), weight, part, norm_weight, EPS)
        return part, ops.quant_matmul(normed, [following])

    sums, products = run(0, 16)
    for first, last in ((0, 1), (15, 16), (3, 5), (7, 11), (8, 15), (3, 12), (1, 16)):
        part_sums, part_products = run(first, last)
        assert torch.equal(part_sums, sums[first:last])
        assert torch.equal(part_products, products[first:last])


@pytest.mark.cuda
def test_it_is_what_the_ops_by_themselves_make(make_on_cuda: Callable[..., Inputs]) -> None:
    x, weight, residual, norm_weight, bias = make_on_cuda("q4_k", 5, 96, 2048, with_bias=True)
    alone = residual.clone()
    product = ops.quant_matmul(x, [weight], [bias])
    expected = ops.rms_norm(product, norm_weight, EPS, residual=alone, keep_float=True)
    out = ops.matmul_add_norm(x, weight, residual, norm_weight, EPS, bias=bias, keep_float=True)
    assert torch.allclose(residual, alone, rtol=1e-6, atol=1e-5)
    assert torch.allclose(ops.as_float(out), ops.as_float(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.cuda
def test_a_value_that_is_no_number_does_not_become_one(make_on_cuda: Callable[..., Inputs]) -> None:
    x, weight, residual, norm_weight, _ = make_on_cuda("q8_0", 2, 96, 64)
    residual[1, 40] = torch.nan
    values = ops.as_float(ops.matmul_add_norm(x, weight, residual, norm_weight, EPS))
    assert values[0].isfinite().all()
    assert values[1].isnan().all()


@pytest.mark.cuda
def test_a_replay_equals_the_eager_call(
    make_on_cuda: Callable[..., Inputs], cuda_capture: Callable[..., tuple[Callable[[], None], Tensor]]
) -> None:
    x, weight, residual, norm_weight, _ = make_on_cuda("q6_k", 3, 128, 512)
    following = ops.pack_weight("q4_0", random_raw("q4_0", 48, 128), 48, 128, x.device)

    def run(sums: Tensor) -> Tensor:
        return ops.quant_matmul(ops.matmul_add_norm(x, weight, sums, norm_weight, EPS), [following])

    replay, out = cuda_capture(lambda: run(residual))
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        alone = residual.clone()
        replay()
        assert torch.equal(out, run(alone))
        assert torch.equal(residual, alone)


def test_what_does_not_fit_is_refused(make: Callable[..., Inputs]) -> None:
    x, weight, residual, norm_weight, _ = make("q8_0", 2, 48, 64)
    with pytest.raises(ValueError, match="does not fit"):
        ops.matmul_add_norm(x[:, :32].contiguous(), weight, residual, norm_weight, EPS)
    with pytest.raises(ValueError, match="residual"):
        ops.matmul_add_norm(x, weight, residual[:1], norm_weight, EPS)
    with pytest.raises(ValueError, match="weight"):
        ops.matmul_add_norm(x, weight, residual, norm_weight[:32], EPS)


def _poison_what_is_freed(device: torch.device, num_rows: int, cols: int) -> None:
    """Fills memory with NaN that the next allocations of these sizes will probably get."""
    out = ops.empty_activation(num_rows, cols, device, keep_float=True)
    squares = torch.empty(num_rows, 4, device=device)
    for form in (out.q8, out.x, squares):
        assert form is not None
        form.view(torch.uint8).fill_(0xFF)
