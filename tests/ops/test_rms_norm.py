import pytest
import torch

from helexa import ops

SHAPES = [(1, 1), (1, 63), (1, 1024), (2, 576), (3, 1000), (63, 16), (300, 896)]


@pytest.mark.parametrize(("num_tokens", "width"), SHAPES)
def test_it_equals_the_reference(isa, num_tokens, width, assert_close, poisoned):
    x, weight = torch.randn(num_tokens, width) * 3, torch.randn(width)
    out = ops.rms_norm(x, weight, 1e-6, out=poisoned(num_tokens, width))
    assert_close("rms_norm", ops.rms_norm_reference(x, weight, 1e-6), out, 1e-6)


@pytest.mark.parametrize(("num_tokens", "width"), SHAPES)
def test_a_residual_is_added_to_in_place_and_its_sum_is_normed(
    isa, num_tokens, width, assert_close, poisoned
):
    x, weight, residual = torch.randn(num_tokens, width), torch.randn(width), torch.randn(num_tokens, width)
    expected_residual = residual.clone()
    expected = ops.rms_norm_reference(x, weight, 1e-5, residual=expected_residual)
    out = ops.rms_norm(x, weight, 1e-5, residual=residual, out=poisoned(num_tokens, width))
    assert torch.equal(residual, expected_residual)
    assert_close("rms_norm", expected, out, 1e-6)


@pytest.mark.parametrize("with_residual", [False, True])
def test_out_may_be_x(isa, with_residual, assert_close):
    x, weight = torch.randn(5, 100), torch.randn(100)
    residual = torch.randn(5, 100) if with_residual else None
    expected = ops.rms_norm_reference(
        x, weight, 1e-6, residual=None if residual is None else residual.clone()
    )
    assert ops.rms_norm(x, weight, 1e-6, residual=residual, out=x) is x
    assert_close("rms_norm", expected, x, 1e-6)


def test_a_row_of_zeros_gives_zeros(isa):
    assert torch.equal(ops.rms_norm(torch.zeros(2, 40), torch.ones(40), 1e-6), torch.zeros(2, 40))


def test_eps_counts(isa, assert_close):
    x = torch.full((1, 32), 1e-3)
    out = ops.rms_norm(x, torch.ones(32), 1e-6)
    assert_close("rms_norm", torch.full((1, 32), 0.5**0.5), out, 1e-6)
    with pytest.raises(AssertionError):
        assert_close("without eps", torch.ones(1, 32), out, 1e-2)


def test_a_replay_equals_the_eager_call(isa):
    x, weight, residual = torch.randn(3, 72), torch.randn(72), torch.randn(3, 72)
    graph = ops.CpuGraph()
    with graph.capture():
        out = ops.rms_norm(x, weight, 1e-6, residual=residual)
    x.copy_(torch.randn(3, 72))
    eager_residual = residual.clone()
    eager = ops.rms_norm(x, weight, 1e-6, residual=eager_residual)
    graph.replay()
    assert torch.equal(out, eager)
    assert torch.equal(residual, eager_residual)


@pytest.mark.parametrize(
    ("x", "weight", "arguments"),
    [
        (torch.zeros(2, 8), torch.zeros(7), {}),
        (torch.zeros(2, 8), torch.zeros(8).half(), {}),
        (torch.zeros(2, 8).half(), torch.zeros(8), {}),
        (torch.zeros(8, 2).t(), torch.zeros(8), {}),
        (torch.zeros(8), torch.zeros(8), {}),
        (torch.zeros(2, 8), torch.zeros(8), {"out": torch.zeros(3, 8)}),
        (torch.zeros(2, 8), torch.zeros(8), {"residual": torch.zeros(2, 8).half()}),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, arguments):
    with pytest.raises(ValueError, match="rms_norm"):
        ops.rms_norm(x, weight, 1e-6, **arguments)


@pytest.mark.cuda
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)]
)
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 1), (1, 63), (3, 1000), (300, 4096)])
def test_a_cuda_graph_on_torchs_stream_equals_the_reference(
    num_tokens, width, dtype, tolerance, with_residual, assert_close
):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = torch.randn(num_tokens, width, device="cuda", dtype=dtype)
    weight = torch.randn(width, device="cuda")
    residual = torch.randn_like(x) if with_residual else None
    out = torch.full_like(x, torch.nan)
    # An eager call first: a kernel's first launch loads it, which no capture allows.
    ops.rms_norm(x, weight, 1e-6, residual=None if residual is None else residual.clone(), out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.rms_norm(x, weight, 1e-6, residual=residual, out=out)
    x.copy_(torch.randn_like(x))
    out.fill_(torch.nan)
    expected_residual = None if residual is None else residual.clone()
    expected = ops.rms_norm_reference(x, weight, 1e-6, residual=expected_residual)
    graph.replay()
    torch.cuda.synchronize()
    assert_close("rms_norm", expected, out, tolerance)
    if residual is not None:
        assert torch.equal(residual, expected_residual)


@pytest.mark.cuda
def test_cuda_refuses_a_weight_on_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with pytest.raises(ValueError, match="weight is on cpu"):
        ops.rms_norm(torch.zeros(2, 8, device="cuda"), torch.zeros(8), 1e-6)
