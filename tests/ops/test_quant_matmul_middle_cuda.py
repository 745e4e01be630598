"""Products of some tens to hundreds of rows on a CUDA device, with weights that stay packed."""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helexa import _C, ops
from helexa.ops import PackedWeight
from helexa.ops.dequantize import unpacked_matmul_reference
from helexa.quant import FORMATS
from support.products import error

pytestmark = pytest.mark.cuda

module = importlib.import_module("helexa.ops.quant_matmul")  # ops.quant_matmul is the function

FEWEST = ops.MAX_MATVEC_ROWS + 1
FLOATS = ("f32", "f16", "bf16")


@pytest.fixture
def rows_of(cuda_device: str) -> Callable[..., Tensor]:
    def rows(num_rows: int, cols: int) -> Tensor:
        x = torch.randn(num_rows, cols) * (0.1 + torch.rand(num_rows, 1) * 3)
        return x.bfloat16().to(cuda_device)

    return rows


@pytest.fixture(autouse=True)
def unpacks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests multiply is multiplied by the kernel."""

    def fail(*_: object) -> None:
        raise AssertionError("weights were unpacked")

    monkeypatch.setattr(module, "unpacked_matmul", fail)


def run(x: Tensor, weights: list[PackedWeight], biases: list[Tensor | None] | None = None) -> Tensor:
    """The product as float32, in memory that was NaN before."""
    out = torch.full((len(x), sum(w.rows for w in weights)), float("nan"), device=x.device)
    return ops.quant_matmul(ops.Activation(x.shape[1], bf16=x), weights, biases, out=out, dtype=out.dtype)


@pytest.mark.parametrize("num_rows", [FEWEST, 50, 83])
@pytest.mark.parametrize("format", [format for format in FORMATS if format not in FLOATS])
def test_every_format_equals_the_reference(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor], format: str, num_rows: int
) -> None:
    weight, x = make(format, 16 * 2 + 5, 768, num_rows), rows_of(num_rows, 768)
    # A weight halfway between two bfloat16 numbers may be rounded to the other one.
    assert error(run(x, [weight]), unpacked_matmul_reference(x, [weight]).float()) < 1e-2


@pytest.mark.parametrize("cols", [32, 96, 320, 544, 2336])
@pytest.mark.parametrize("format", ["q4_0", "q5_1", "q8_0", "iq4_nl"])
def test_widths_that_are_no_whole_run_equal_the_reference(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor], format: str, cols: int
) -> None:
    weight, x = make(format, 23, cols), rows_of(FEWEST, cols)
    assert error(run(x, [weight]), unpacked_matmul_reference(x, [weight]).float()) < 1e-2


@pytest.mark.parametrize("num_rows", [FEWEST, 40, 100, 129, module.MAX_MIDDLE_ROWS])
def test_tiles_that_several_blocks_share_equal_the_reference(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor], num_rows: int
) -> None:
    """And again in a workspace that was used before."""
    weights = [make("q4_k", 16 * 9, 2304), make("q6_k", 16 * 5 + 2, 2304), make("q8_0", 48, 2304)]
    for _ in range(2):
        x = rows_of(num_rows, 2304)
        assert error(run(x, weights), unpacked_matmul_reference(x, weights).float()) < 1e-2


def test_a_large_product_equals_the_reference(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor]
) -> None:
    weights, x = [make("q4_k", 16 * 40, 512), make("q5_k", 16 * 23, 512)], rows_of(70, 512)
    assert error(run(x, weights), unpacked_matmul_reference(x, weights).float()) < 1e-2


@pytest.mark.parametrize("num_rows", [20, 70])
def test_mixed_formats_and_biases_lie_side_by_side(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor], num_rows: int
) -> None:
    formats = {"q4_k": 33, "q6_k": 16, "f32": 7, "q5_0": 90, "f16": 18, "bf16": 20}
    weights = [make(format, rows, 512, rows) for format, rows in formats.items()]
    x = rows_of(num_rows, 512)
    biases = [torch.randn(33), None, torch.randn(7), torch.randn(90), None, None]
    biases = [None if bias is None else bias.to(x.device) for bias in biases]
    out = run(x, weights, biases)
    assert error(out, unpacked_matmul_reference(x, weights, biases).float()) < 1e-2
    rounded = ops.quant_matmul(ops.Activation(512, bf16=x), weights, biases)
    assert torch.equal(rounded, out.bfloat16())


@pytest.mark.parametrize("formats", [("q4_k", "q4_k"), ("q4_k", "q6_k"), ("q8_0", "bf16")])
@pytest.mark.parametrize(("num_rows", "inner"), [(FEWEST, 80), (45, 23), (90, 592)])
def test_the_gated_product_is_the_input_of_the_next_one(
    make: Callable[..., PackedWeight],
    rows_of: Callable[..., Tensor],
    formats: tuple[str, str],
    num_rows: int,
    inner: int,
) -> None:
    weights = [make(format, inner, 512, i) for i, format in enumerate(formats)]
    x = rows_of(num_rows, 512)
    biases = [torch.randn(inner).to(x.device), None]
    for used in (None, biases):
        result = ops.gated_matmul(ops.Activation(512, bf16=x), weights, used)
        assert isinstance(result, ops.Activation)
        assert result.bf16 is not None
        truth = ops.silu_mul_reference(unpacked_matmul_reference(x, weights, used).float())
        assert (result.bf16.float() - truth).abs().max() <= 4e-3 * truth.abs().max()
        swapped = ops.gated_matmul(ops.Activation(512, bf16=x), weights[::-1], used)
        assert isinstance(swapped, ops.Activation)
        assert (swapped.values() - truth).abs().max() > 0.1 * truth.abs().max()


def test_a_neighbouring_scale_would_be_noticed(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor]
) -> None:
    weight, x = make("q4_k", 16, 512), rows_of(FEWEST, 512)
    truth = unpacked_matmul_reference(x, [weight]).float()
    assert error(unpacked_matmul_reference(x.roll(32, 1), [weight]).float(), truth) > 0.3


def test_a_bad_number_reaches_its_own_row_only(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor]
) -> None:
    weight, x = make("q4_0", 16, 64), rows_of(FEWEST, 64)
    x[3, 40] = float("nan")
    y = run(x, [weight])
    assert y[3].isnan().all()
    assert torch.cat([y[:3], y[4:]]).isfinite().all()


def test_the_workspace_is_left_as_it_was_found(
    make: Callable[..., PackedWeight], rows_of: Callable[..., Tensor], cuda_device: str
) -> None:
    weight, x = make("q4_k", 64, 2304), rows_of(FEWEST, 2304)
    first = run(x, [weight])
    assert torch.equal(run(x, [weight]), first)
    counters = module._workspace(weight.data.device)[:16]
    assert not counters.any()
    assert _C.middle_matmul_workspace_bytes() > 16
