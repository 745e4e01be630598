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
        (torch.zeros(2, 8), torch.zeros(8), {"out": ops.Activation(8, x=torch.zeros(3, 8))}),
        (torch.zeros(8, 2).t(), torch.zeros(8), {}),
        (torch.zeros(8), torch.zeros(8), {}),
        (torch.zeros(2, 8), torch.zeros(8), {"out": torch.zeros(3, 8)}),
        (torch.zeros(2, 8), torch.zeros(8), {"residual": torch.zeros(2, 8).half()}),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, arguments):
    with pytest.raises(ValueError, match="rms_norm"):
        ops.rms_norm(x, weight, 1e-6, **arguments)


# On a device: the residual is float32, and the result has the forms that matmuls read.

CUDA_SHAPES = [
    (1, 1),
    (1, 63),
    (1, 64),
    (2, 100),
    (3, 1000),
    (2, 5120),
    (64, 96),
    (65, 99),
    (66, 1024),
    (1, 12288),
]


def _poisoned_activation(num_rows, cols, device):
    out = ops.empty_activation(num_rows, cols, torch.device(device), keep_float=True)
    for form in (out.q8, out.bf16, out.x):
        if form is not None:
            form.view(torch.uint8).fill_(0xFF)
    return out


@pytest.mark.cuda
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "width"), CUDA_SHAPES)
def test_on_a_device_every_form_equals_the_reference(
    cuda_device, num_tokens, width, dtype, with_residual, assert_close
):
    x = (3 * torch.randn(num_tokens, width, device=cuda_device)).to(dtype)
    weight = torch.randn(width, device=cuda_device)
    residual = torch.randn(num_tokens, width, device=cuda_device) if with_residual else None
    expected_residual = None if residual is None else residual.clone()
    expected = ops.rms_norm_reference(x, weight, 1e-6, residual=expected_residual)
    out = _poisoned_activation(num_tokens, width, cuda_device)
    assert ops.rms_norm(x, weight, 1e-6, residual=residual, out=out) is out
    assert_close("float32", expected, out.x, 1e-6)
    if residual is not None:
        assert torch.equal(residual, expected_residual)
    if num_tokens <= ops.MAX_MATVEC_ROWS:
        assert out.bf16 is None
        assert torch.equal(out.q8, _quantized(out.x))
    else:
        assert out.q8 is None
        assert torch.equal(out.bf16, out.x.bfloat16())


def _quantized(x):
    """Rows of int8 codes as csrc/ops/activation.cuh describes them."""
    padded = torch.nn.functional.pad(x.cpu(), (0, -x.shape[1] % 64)).unflatten(1, (-1, 32))
    most = padded.abs().amax(-1, keepdim=True)
    codes = (padded * torch.where(most > 0, 127 / most, torch.zeros(()))).round()
    scales = most / 127
    tail = torch.cat([scales, scales * codes.sum(-1, keepdim=True)], dim=-1).flatten(1)
    # [rows, group, half of 32, quarter of 16, lane, 4 columns] -> lane, half, quarter, 4 columns
    ordered = (
        codes.to(torch.int8).flatten(1).unflatten(1, (-1, 2, 2, 4, 4)).permute(0, 1, 4, 2, 3, 5).flatten(1)
    )
    rows = torch.cat([ordered.view(torch.uint8), tail.contiguous().view(torch.uint8)], dim=1)
    return rows.to(x.device)


@pytest.mark.cuda
def test_the_codes_of_a_device_stand_for_the_values(cuda_device, assert_close):
    x, weight = torch.randn(5, 200, device=cuda_device), torch.randn(200, device=cuda_device)
    out = ops.rms_norm(x, weight, 1e-6)
    expected = ops.rms_norm_reference(x, weight, 1e-6)
    assert_close("int8", expected, out.values(), 0.01)
    assert_close("some rows", expected[1:3], out[1:3].values(), 0.01)
    with pytest.raises(AssertionError, match="differs"):
        assert_close("shifted", expected.roll(1, 1), out.values(), 0.1)


@pytest.mark.cuda
def test_a_value_that_is_no_number_does_not_become_one(cuda_device):
    x = torch.ones(2, 96, device=cuda_device)
    x[1, 40] = torch.nan
    values = ops.rms_norm(x, torch.ones(96, device=cuda_device), 1e-6).values()
    assert values[0].isfinite().all()
    assert values[1].isnan().all()


@pytest.mark.cuda
@pytest.mark.parametrize("num_tokens", [3, 100])
def test_on_a_device_a_replay_equals_the_eager_call(cuda_device, cuda_capture, num_tokens):
    x, weight = torch.randn(num_tokens, 200, device=cuda_device), torch.randn(200, device=cuda_device)
    residual = torch.randn(num_tokens, 200, device=cuda_device)
    replay, out = cuda_capture(lambda: ops.rms_norm(x, weight, 1e-6, residual=residual, keep_float=True))
    x.copy_(torch.randn_like(x))
    eager_residual = residual.clone()
    eager = ops.rms_norm(x, weight, 1e-6, residual=eager_residual, keep_float=True)
    replay()
    assert torch.equal(residual, eager_residual)
    assert torch.equal(out.values(), eager.values())
    assert torch.equal(out.x, eager.x)


@pytest.mark.cuda
def test_a_device_refuses_what_does_not_fit(cuda_device):
    x, weight = torch.zeros(2, 8, device=cuda_device), torch.zeros(8, device=cuda_device)
    with pytest.raises(ValueError, match="expected float32 or bfloat16"):
        ops.rms_norm(x.half(), weight, 1e-6)
    with pytest.raises(ValueError, match="residual"):
        ops.rms_norm(x.bfloat16(), weight, 1e-6, residual=x.bfloat16())
    with pytest.raises(ValueError, match="out is an Activation"):
        ops.rms_norm(x, weight, 1e-6, out=torch.zeros_like(x))
    with pytest.raises(ValueError, match="up to 16384"):
        ops.rms_norm(torch.zeros(1, 20000, device=cuda_device), torch.zeros(20000, device=cuda_device), 1e-6)
