"""Gated delta nets of random numbers, and what the reference makes of them in float64."""

from dataclasses import replace

import torch

from helexa.ops.gated_delta_net import DeltaParameters, gated_delta_net_reference


def parameters(heads=(2, 6, 32, 48), *, device="cpu", taps=4, tiled=False, decay=1.0):
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


def random_states(p, num_slots):
    return [torch.randn(shape).to(p.decay.device) for shape in p.state_shapes(num_slots)]


def places(device, lengths, starts=None, slots=None):
    """state_slots, query_start and kv_lengths."""
    starts = starts or [0] * len(lengths)
    return (
        numbers(device, range(len(lengths)) if slots is None else slots),
        numbers(device, [0, *lengths]).cumsum(0).int(),
        numbers(device, [start + length for start, length in zip(starts, lengths, strict=True)]),
    )


def reference(p, x, lengths, states, *, starts=None, slots=None):
    on_host = {name: getattr(p, name).cpu() for name in ("conv_weight", "decay", "dt_bias", "norm_weight")}
    slots, query_start, kv_lengths = places("cpu", lengths, starts, slots)
    states = [state.cpu().double() for state in states]
    out = gated_delta_net_reference(
        x.cpu().double(), replace(p, **on_host), *states, slots, query_start, kv_lengths
    )
    return out.float(), [state.float() for state in states]
