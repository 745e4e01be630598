import pytest
import torch

from helexa import ops


@pytest.mark.parametrize(
    ("num_tokens", "width"), [(1, 1), (1, 63), (1, 3072), (2, 1536), (63, 1000), (300, 160)]
)
def test_it_equals_the_reference(isa, num_tokens, width, assert_close, poisoned):
    gate_up = torch.randn(num_tokens, 2 * width) * 4
    out = ops.silu_mul(gate_up, out=poisoned(num_tokens, width))
    assert_close("silu_mul", ops.silu_mul_reference(gate_up.double()).float(), out, 1e-6)


def test_each_value_is_accurate_over_the_whole_range_of_the_gate(isa):
    gate = torch.linspace(-80, 80, 4001)
    out = ops.silu_mul(torch.cat([gate, torch.ones_like(gate)])[None])[0]
    expected = torch.nn.functional.silu(gate.double())
    assert ((out - expected).abs() <= 4e-7 * expected.abs()).all()


def test_large_gates_give_no_nan(isa):
    gate = torch.tensor([-1e30, -1e4, -200.0, 200.0, 1e4, 1e30])
    out = ops.silu_mul(torch.cat([gate, torch.ones_like(gate)])[None])[0]
    assert torch.allclose(out, gate.clamp(min=0.0), rtol=1e-6, atol=1e-6)


def test_swapped_halves_are_noticed(assert_close):
    gate_up = torch.randn(4, 64)
    swapped = torch.cat(gate_up.chunk(2, dim=-1)[::-1], dim=-1)
    with pytest.raises(AssertionError, match="differs"):
        assert_close("swapped", ops.silu_mul_reference(gate_up), ops.silu_mul(swapped), 1e-2)


def test_a_replay_equals_the_eager_call(isa):
    gate_up, graph = torch.randn(3, 72), ops.CpuGraph()
    with graph.capture():
        out = ops.silu_mul(gate_up)
    gate_up.copy_(torch.randn(3, 72))
    graph.replay()
    assert torch.equal(out, ops.silu_mul(gate_up))


@pytest.mark.parametrize(
    ("gate_up", "out"),
    [
        (torch.zeros(2, 7), None),
        (torch.zeros(2, 8).half(), None),
        (torch.zeros(8, 2).t(), None),
        (torch.zeros(2, 8), torch.zeros(2, 8)),
        (torch.zeros(2, 8), torch.zeros(4, 2).t()),
    ],
)
def test_what_does_not_fit_is_refused(gate_up, out):
    with pytest.raises(ValueError, match="silu_mul"):
        ops.silu_mul(gate_up, out=out)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "width"), [(1, 1), (2, 63), (1, 3072), (64, 96), (65, 100), (66, 2056), (70, 4096)]
)
def test_on_a_device_it_equals_the_reference(cuda_device, num_tokens, width, dtype, assert_close):
    gate_up = (4 * torch.randn(num_tokens, 2 * width, device=cuda_device)).to(dtype)
    out = ops.empty_activation(num_tokens, width, gate_up.device)
    for form in (out.q8, out.bf16):
        if form is not None:
            form.view(torch.uint8).fill_(0xFF)
    expected = ops.silu_mul_reference(gate_up.float())
    assert ops.silu_mul(gate_up, out=out) is out
    assert (out.q8 is None) == (num_tokens > ops.MAX_MATVEC_ROWS)
    assert_close("silu_mul", expected, out.values(), 0.02 if out.bf16 is None else 4e-3)


@pytest.mark.cuda
def test_on_a_device_swapped_halves_are_noticed(cuda_device, assert_close):
    gate_up = torch.randn(4, 128, device=cuda_device)
    swapped = torch.cat(gate_up.chunk(2, dim=-1)[::-1], dim=-1).contiguous()
    with pytest.raises(AssertionError, match="differs"):
        assert_close("swapped", ops.silu_mul_reference(gate_up), ops.silu_mul(swapped).values(), 0.02)


@pytest.mark.cuda
def test_on_a_device_large_gates_give_no_nan(cuda_device):
    gate = torch.tensor([-1e30, -1e4, -200.0, 200.0, 1e4, 1e30])
    rows = torch.cat([gate, torch.ones_like(gate)]).repeat(70, 1).to(cuda_device)
    out = ops.silu_mul(rows).values().cpu()
    assert torch.allclose(out, gate.clamp(min=0.0).expand(70, -1), rtol=4e-3, atol=1e-6)


@pytest.mark.cuda
def test_on_a_device_a_replay_equals_the_eager_call(cuda_device, cuda_capture):
    gate_up = torch.randn(3, 72, device=cuda_device)
    replay, out = cuda_capture(lambda: ops.silu_mul(gate_up))
    gate_up.copy_(torch.randn_like(gate_up))
    replay()
    assert torch.equal(out.values(), ops.silu_mul(gate_up).values())


@pytest.mark.cuda
def test_a_device_refuses_what_does_not_fit(cuda_device):
    with pytest.raises(ValueError, match="expected float32 or bfloat16"):
        ops.silu_mul(torch.zeros(2, 8, device=cuda_device).half())
    with pytest.raises(ValueError, match="out is an Activation"):
        ops.silu_mul(torch.zeros(2, 8, device=cuda_device), out=torch.zeros(2, 4, device=cuda_device))
