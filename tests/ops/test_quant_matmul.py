import numpy as np
import pytest
import torch

from helexa import _C, ops
from helexa.ops.quant_matmul import quantize_input_reference
from helexa.quant import FORMATS
from support.products import LARGEST_CODES, error
from support.random_weights import random_raw


def make(format: str, rows: int, cols: int, seed: int = 0) -> ops.PackedWeight:
    return ops.pack_weight(format, random_raw(format, rows, cols, seed), rows, cols)


def run(
    x: torch.Tensor, weights: list[ops.PackedWeight], biases: list[torch.Tensor | None] | None = None
) -> torch.Tensor:
    out = torch.full((x.shape[0], sum(w.rows for w in weights)), float("nan"))
    return ops.quant_matmul(x, weights, biases, out=out)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 11, 12, 13, 25, 63])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_and_instruction_set_equals_the_reference(isa: str, format: str, tokens: int) -> None:
    torch.manual_seed(tokens)
    rows, cols = 16 * 3 + 5, 768
    weight = make(format, rows, cols, seed=tokens)
    x = torch.randn(tokens, cols) * torch.rand(tokens, 1) * 3
    assert error(run(x, [weight]), ops.quant_matmul_reference(x, [weight])) < 2e-5


@pytest.mark.parametrize("rows", [1, 16, 17, 1000])
@pytest.mark.parametrize("cols", [256, 1024, 5632])
def test_odd_sizes_equal_the_reference(rows: int, cols: int) -> None:
    weight = make("q4_k", rows, cols)
    x = torch.randn(7, cols)
    assert error(run(x, [weight]), ops.quant_matmul_reference(x, [weight])) < 3e-5


def test_mixed_formats_and_biases_lie_side_by_side(isa: str) -> None:
    cols = 512
    weights = [
        make("q4_k", 33, cols, 1),
        make("q6_k", 16, cols, 2),
        make("f32", 7, cols, 3),
        make("q5_0", 90, cols, 4),
    ]
    biases = [torch.randn(33), None, torch.randn(7), torch.randn(90)]
    for tokens in (1, 4, 30):
        x = torch.randn(tokens, cols)
        assert error(run(x, weights, biases), ops.quant_matmul_reference(x, weights, biases)) < 2e-5


@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("format", LARGEST_CODES)
def test_extreme_codes_do_not_saturate(isa: str, format: str, top: bool) -> None:
    """Codes at either end against inputs whose int8 codes are all at their limit: 16-bit partial sums would
    overflow here."""
    layout = FORMATS[format]
    codes, byte = LARGEST_CODES[format]
    blocks = random_raw(format, 16, 512).reshape(-1, layout.block_bytes).copy()
    blocks[:, codes] = byte if not top else 0x80 if format == "q8_0" else byte ^ 0xFF
    weight = ops.pack_weight(format, blocks.reshape(16, -1), 16, 512)
    for sign in (1.0, -1.0):
        x = torch.full((3, 512), sign)
        assert error(run(x, [weight]), ops.quant_matmul_reference(x, [weight])) < 2e-5


def test_zero_and_tiny_inputs_give_zero_and_no_nan(isa: str) -> None:
    weight = make("q8_0", 32, 64)
    assert torch.equal(run(torch.zeros(2, 64), [weight]), torch.zeros(2, 32))
    assert run(torch.full((1, 64), 1e-38), [weight]).isfinite().all()


def test_nan_and_infinity_in_the_input_reach_the_output(isa: str) -> None:
    weight = make("q4_0", 16, 64)
    for bad in (float("nan"), float("inf")):
        x = torch.randn(2, 64)
        x[1, 40] = bad
        y = ops.quant_matmul(x, [weight])
        assert y[0].isfinite().all()
        assert not y[1].isfinite().any()


def test_a_row_does_not_depend_on_its_neighbours_in_the_batch(isa: str) -> None:
    weights = [make("q4_k", 64, 512), make("q6_k", 32, 512)]
    x = torch.randn(30, 512)
    together = ops.quant_matmul(x, weights)
    for rows in (slice(0, 1), slice(3, 5), slice(7, 15), slice(12, 30)):
        alone = ops.quant_matmul(x[rows].contiguous(), weights)
        assert torch.equal(alone, together[rows])


def test_captured_equals_eager_for_new_values() -> None:
    first, second = [make("q4_1", 48, 256), make("f16", 16, 256)], [make("f32", 8, 64)]
    x = torch.randn(2, 256)
    graph = ops.CpuGraph()
    with graph.capture():
        y = ops.quant_matmul(x, first)
        z = ops.quant_matmul(y, second)
    assert len(graph) == 2
    for _ in range(3):
        x.copy_(torch.randn(2, 256))
        graph.replay()
        assert torch.equal(y, ops.quant_matmul(x, first))
        assert torch.equal(z, ops.quant_matmul(y, second))


def test_capture_refuses_what_a_replay_would_miss() -> None:
    x = torch.randn(2, 256)
    with pytest.raises(RuntimeError, match="computes with torch"), ops.CpuGraph().capture():
        x + 1
    assert len(_C.CpuGraph()) == 0


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    weight = make("q5_k", 640, 512)
    x = torch.randn(40, 512)
    before = ops.num_threads()
    try:
        outs = []
        for threads in (1, 2, 3):
            ops.set_num_threads(threads)
            assert ops.num_threads() == threads
            outs.append(ops.quant_matmul(x, [weight]))
    finally:
        ops.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_thousands_of_small_steps_on_more_threads_than_cores_stay_exact() -> None:
    """Helpers that come late, sleep or are taken off their core must neither skip nor repeat a range."""
    weights = [make("q8_0", 256, 64, seed) for seed in range(4)]
    x = torch.randn(1, 64)
    expected = [ops.quant_matmul(x, [weight]) for weight in weights]
    graph = ops.CpuGraph()
    before = ops.num_threads()
    try:
        ops.set_num_threads(5)
        with graph.capture():
            outs = [ops.quant_matmul(x, [weight]) for weight in weights * 25]
        for _ in range(20):
            for out in outs:
                out.fill_(float("nan"))
            graph.replay()
            assert all(torch.equal(out, expected[i % 4]) for i, out in enumerate(outs))
    finally:
        ops.set_num_threads(before)


def test_a_wrong_zero_point_would_be_noticed() -> None:
    """The tolerance of these tests is small against an error of one code step."""
    weight = make("q4_0", 32, 512)
    x = torch.randn(4, 512)
    truth = ops.quant_matmul_reference(x, [weight])
    shifted = quantize_input_reference(x) @ (weight.dequantize() + 0.002).double().T
    assert error(shifted.float(), truth) > 1e-3


def test_what_does_not_fit_is_refused() -> None:
    weight = make("q8_0", 16, 64)
    with pytest.raises(ValueError, match="does not fit"):
        ops.quant_matmul(torch.randn(2, 96), [weight])
    with pytest.raises(ValueError, match="float32"):
        ops.quant_matmul(torch.randn(2, 64).half(), [weight])
    with pytest.raises(ValueError, match="bias"):
        ops.quant_matmul(torch.randn(2, 64), [weight], [torch.randn(15)])
    with pytest.raises(ValueError, match="out"):
        ops.quant_matmul(torch.randn(2, 64), [weight], out=torch.empty(2, 15))


@pytest.mark.parametrize("format", FORMATS)
def test_embedding_rows_are_the_files_values(format: str) -> None:
    weight = make(format, 100, 512)
    ids = torch.tensor([0, 99, 17, 17, 63], dtype=torch.int32)
    out = torch.full((5, 512), float("nan"))
    assert torch.equal(ops.embedding(ids, weight, out=out), ops.embedding_reference(ids, weight))


def test_embedding_of_an_unknown_token_is_zero() -> None:
    weight = make("q8_0", 20, 64)
    out = ops.embedding(torch.tensor([20, -1, 3], dtype=torch.int32), weight)
    assert torch.equal(out[:2], torch.zeros(2, 64))
    assert np.isfinite(out[2].numpy()).all()
