"""The CUDA kernels against the reference in float64: token by token, and in chunks with 11 bits."""

from dataclasses import replace

import pytest
import torch

from helexa import ops
from helexa.ops.gated_delta_net import DeltaParameters, gated_delta_net, gated_delta_net_reference

pytestmark = pytest.mark.cuda

FEW = 15  # the longest sequence that goes token by token where others may go in chunks


def parameters(device, heads, *, taps=4, tiled=False, decay=1.0):
    key_heads, value_heads, key_dim, value_dim = heads
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    return DeltaParameters(
        conv_weight=(torch.randn(taps, channels) / taps**0.5).to(device),
        decay=(-torch.rand(value_heads) * decay).to(device),
        dt_bias=torch.randn(value_heads).to(device),
        norm_weight=(1 + 0.1 * torch.randn(value_dim)).to(device),
        num_key_heads=key_heads,
        key_head_dim=key_dim,
        eps=1e-6,
        tiled=tiled,
    )


def buffers(p, num_slots, fill=torch.nan):
    return [torch.full(shape, fill, device=p.decay.device) for shape in p.state_shapes(num_slots)]


def numbers(device, values):
    return torch.tensor(values, dtype=torch.int32, device=device)


def run(p, x, lengths, states, *, starts=None, slots=None, form="x"):
    """The op for sequences of these lengths that stand at `starts`; float32 unless asked for codes."""
    device = p.decay.device
    query_start = numbers(device, [0, *lengths]).cumsum(0).int()
    slots = numbers(device, range(len(lengths)) if slots is None else slots)
    kv_lengths = numbers(device, [n + (starts[i] if starts else 0) for i, n in enumerate(lengths)])
    out = None
    if form == "x":
        poison = torch.full((x.shape[0], p.value_dim), torch.nan, device=device)
        out = ops.Activation(p.value_dim, x=poison)
    return gated_delta_net(x, p, *states, slots, query_start, kv_lengths, out=out).values()


def reference(p, x, lengths, states, *, starts=None, slots=None):
    on_host = {name: getattr(p, name).cpu() for name in ("conv_weight", "decay", "dt_bias", "norm_weight")}
    query_start = torch.tensor([0, *lengths]).cumsum(0)
    slots = torch.tensor(range(len(lengths)) if slots is None else slots)
    kv_lengths = torch.tensor([n + (starts[i] if starts else 0) for i, n in enumerate(lengths)])
    states = [state.cpu().double() for state in states]
    tensors = (slots, query_start, kv_lengths)
    out = gated_delta_net_reference(x.cpu().double(), replace(p, **on_host), *states, *tensors)
    return out.float(), [state.float() for state in states]


def check(assert_close, p, x, lengths, tolerance, **options):
    """Out and states against the reference's; a state begins with random numbers."""
    states = [torch.randn(shape).to(p.decay.device) for shape in p.state_shapes(len(lengths))]
    expected, expected_states = reference(p, x, lengths, states, **options)
    assert_close("out", expected, run(p, x, lengths, states, **options).cpu(), tolerance)
    assert_close("conv", expected_states[0], states[0].cpu(), 1e-6)
    assert_close("state", expected_states[1], states[1].cpu(), tolerance)


# --- token by token -----------------------------------------------------------------------------

SHAPES = ((1, 1, 16, 16), (2, 6, 32, 48), (2, 4, 128, 128), (1, 1, 256, 256), (1, 3, 80, 208))


@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("tiled", [False, True])
def test_few_tokens_of_several_sequences(cuda_device, heads, tiled, assert_close):
    p = parameters(cuda_device, heads, tiled=tiled)
    lengths = [1, 2, 3, 1, 9]
    x = torch.randn(sum(lengths), p.row).to(cuda_device)
    check(assert_close, p, x, lengths, 1e-5, starts=[5, 0, 1, 0, 0])


@pytest.mark.parametrize("heads", [(2, 4, 128, 128)])
def test_chunks(cuda_device, heads, assert_close):
    p = parameters(cuda_device, heads)
    lengths = [130]
    x = torch.randn(sum(lengths), p.row).to(cuda_device)
    check(assert_close, p, x, lengths, 2e-3, starts=[5])
