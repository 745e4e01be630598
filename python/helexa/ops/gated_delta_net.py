"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464) as Qwen3-Next uses it, between its two projections.

Convolution, norms, gates, delta rule and gated norm of one layer are one op, since each is local to a head.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from helexa import _C
from helexa.ops.activation import Activation, Rows, empty_activation, quantize_rows
from helexa.ops.tensor import check, check_tensor, dtype_id, on_cuda, stream

MAX_STATE_DIM = 256
_L2_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class DeltaParameters:
    """What a layer has learned beside its projections; all float32 and contiguous.

    conv_weight [taps, C]: the newest tap last, C = 2·H_k·d_k + H_v·d_v.   decay [H_v]: -exp(A_log).
    dt_bias [H_v].   norm_weight [d_v].   tiled: value head h reads key head h % H_k, else h // (H_v / H_k).
    """

    conv_weight: Tensor
    decay: Tensor
    dt_bias: Tensor
    norm_weight: Tensor
    num_key_heads: int
    key_head_dim: int
    eps: float
    tiled: bool
    _counters: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("conv_weight", "decay", "dt_bias", "norm_weight"):
            value = getattr(self, name)
            check(
                value.dtype == torch.float32 and value.is_contiguous(),
                f"gated_delta_net: {name} has to be contiguous float32",
            )
        taps, conv_dim = self.conv_weight.shape
        heads = self.num_value_heads
        check(taps >= 2, f"gated_delta_net: conv_weight has {taps} taps, expected at least 2")
        check(self.dt_bias.shape == (heads,), f"gated_delta_net: dt_bias {tuple(self.dt_bias.shape)}")
        check(heads % self.num_key_heads == 0, f"gated_delta_net: {heads} heads over {self.num_key_heads}")
        check(conv_dim == 2 * self.key_dim + self.value_dim, f"gated_delta_net: {conv_dim} channels")
        for dim in (self.key_head_dim, self.value_head_dim):
            check(
                dim % 16 == 0 and dim <= MAX_STATE_DIM,
                f"gated_delta_net: head dim {dim} is no multiple of 16 up to {MAX_STATE_DIM}",
            )

    @property
    def num_value_heads(self) -> int:
        return self.decay.shape[0]

    @property
    def value_head_dim(self) -> int:
        return self.norm_weight.shape[0]

    @property
    def key_dim(self) -> int:
        return self.num_key_heads * self.key_head_dim

    @property
    def value_dim(self) -> int:
        return self.num_value_heads * self.value_head_dim

    @property
    def row(self) -> int:
        """Values of a projected token: q, k, v, z, b, a."""
        return 2 * self.key_dim + 2 * self.value_dim + 2 * self.num_value_heads

    def state_shapes(self, num_slots: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of conv_states and states for so many slots."""
        taps, conv_dim = self.conv_weight.shape
        state = (num_slots, self.num_value_heads, self.key_head_dim, self.value_head_dim)
        return (num_slots, taps - 1, conv_dim), state

    def counters(self, num_slots: int) -> Tensor:
        """[num_slots, H_k] int32 zeros on the device: which of a key head's readers is the last (csrc)."""
        if not self._counters or self._counters[-1].shape[0] < num_slots:
            shape = (num_slots, self.num_key_heads)
            # Former ones stay, since captured graphs know their addresses.
            self._counters.append(torch.zeros(shape, dtype=torch.int32, device=self.decay.device))
        return self._counters[-1]


def gated_delta_net(
    x: Tensor,
    parameters: DeltaParameters,
    conv_states: Tensor,
    states: Tensor,
    state_slots: Tensor,
    query_start: Tensor,
    kv_lengths: Tensor,
    *,
    out: Rows | None = None,
    settled: bool = False,
) -> Rows:
    """One layer for the new tokens of S sequences; their states are updated in place.

    x: [T, row] float32 (on CUDA also bfloat16), q | k | v | z | b | a of each token.
    conv_states: [slots, taps - 1, C] float32.   states: [slots, H_v, d_k, d_v] float32.
    state_slots: [S] int32, all different.   query_start: [S + 1] int32.
    kv_lengths: [S] int32; a sequence whose tokens are all here starts from zero, whatever its slot holds.
    out: on the CPU [T, H_v·d_v] float32, on CUDA an Activation with `q8`, `bf16` or `x`.
    settled: on CUDA, allows to read all but x before the launch before this one has ended. It promises that
    a norm, or another launch that waits for those before it at once, lies between this one and whatever wrote
    these tensors (csrc/ops/gated_delta_net.h says why).
    Few tokens go one by one, many in chunks of 64; both round differently, as float32 does.  On CUDA chunks
    round queries, keys and operands of products to 11 bits, and values to the width of x.
    Raises ValueError if a shape or dtype does not fit.  Capturable: allocates only `out` and scratch.
    """
    p = parameters
    is_cuda = on_cuda(x)
    conv_shape, state_shape = p.state_shapes(states.shape[0])
    num_sequences = state_slots.shape[0]
    dtypes = (torch.float32, torch.bfloat16) if is_cuda else (torch.float32,)
    check(x.dtype in dtypes, lambda: f"gated_delta_net: x is {x.dtype}, expected one of {dtypes}")
    for name, tensor, expected, dtype in (
        ("x", x, (x.shape[0], p.row), x.dtype),
        ("conv_states", conv_states, conv_shape, torch.float32),
        ("states", states, state_shape, torch.float32),
        ("state_slots", state_slots, (num_sequences,), torch.int32),
        ("query_start", query_start, (num_sequences + 1,), torch.int32),
        ("kv_lengths", kv_lengths, (num_sequences,), torch.int32),
    ):
        check_tensor("gated_delta_net", name, tensor, expected, dtype)
    tensors = (x, p.conv_weight, p.decay, p.dt_bias, p.norm_weight, conv_states, states, state_slots)
    pointers: list[Any] = [tensor.data_ptr() for tensor in (*tensors, query_start, kv_lengths)]
    sizes: list[Any] = [p.num_key_heads, p.num_value_heads, p.key_head_dim, p.value_head_dim]
    sizes.append(p.conv_weight.shape[0])
    if is_cuda:
        return _on_cuda(x, p, pointers, num_sequences, p.counters(states.shape[0]), sizes, out, settled)
    shape = (x.shape[0], p.value_dim)
    out = torch.empty(shape, dtype=torch.float32) if out is None else out
    if not isinstance(out, Tensor):
        raise ValueError("gated_delta_net: on the CPU out is a tensor")
    check_tensor("gated_delta_net", "out", out, shape, torch.float32)
    arguments = [*pointers, out.data_ptr(), x.shape[0], num_sequences, *sizes, p.eps, p.tiled]
    _C.gated_delta_net_cpu(*arguments)
    return out


def _on_cuda(
    x: Tensor,
    p: DeltaParameters,
    pointers: list[Any],
    num_sequences: int,
    counters: Tensor,
    sizes: list[Any],
    out: Rows | None,
    settled: bool,
) -> Activation:
    num_tokens = x.shape[0]
    if out is None and p.value_head_dim % 32 != 0:  # codes come 32 columns at a time
        plain = Activation(p.value_dim, x=torch.empty(num_tokens, p.value_dim, device=x.device))
        _on_cuda(x, p, pointers, num_sequences, counters, sizes, plain, settled)
        assert plain.x is not None
        return quantize_rows(plain.x)
    if out is None:
        out = empty_activation(num_tokens, p.value_dim, x.device)
    elif not isinstance(out, Activation) or (out.num_rows, out.cols) != (num_tokens, p.value_dim):
        raise ValueError(f"gated_delta_net: on CUDA out is an Activation of {num_tokens} x {p.value_dim}")
    check(
        out.q8 is None or p.value_head_dim % 32 == 0,
        lambda: f"gated_delta_net: codes need heads of a multiple of 32, not {p.value_head_dim}",
    )
    forms = [(i, form) for i, form in enumerate((out.x, out.bf16, out.q8)) if form is not None]
    check(len(forms) == 1, "gated_delta_net: out has to have one form")
    number, form = forms[0]
    work = [num_tokens, num_sequences, *sizes, dtype_id(x)]
    workspace = torch.empty(_C.gated_delta_net_workspace(*work), dtype=torch.uint8, device=x.device)
    arguments = [*pointers, counters.data_ptr(), workspace.data_ptr(), form.data_ptr()]
    arguments += [
        num_tokens,
        num_sequences,
        settled,
        *sizes,
        dtype_id(x),
        number,
        p.eps,
        p.tiled,
        stream(x),
    ]
    _C.gated_delta_net_cuda(*arguments)
    return out


def gated_delta_net_reference(
    x: Tensor,
    parameters: DeltaParameters,
    conv_states: Tensor,
    states: Tensor,
    state_slots: Tensor,
    query_start: Tensor,
    kv_lengths: Tensor,
) -> Tensor:
    """The same in torch, token by token, in the dtype of x."""
    p = parameters
    out = torch.empty(x.shape[0], p.value_dim, dtype=x.dtype)
    for slot, length, first, end in zip(
        state_slots.tolist(),
        kv_lengths.tolist(),
        query_start.tolist(),
        query_start.tolist()[1:],
        strict=False,
    ):
        if length == end - first:
            conv_states[slot] = 0
            states[slot] = 0
        for t in range(first, end):
            out[t] = _token(x[t], p, conv_states[slot], states[slot])
    return out


def _token(x: Tensor, p: DeltaParameters, conv_state: Tensor, state: Tensor) -> Tensor:
    conv_dim, heads = conv_state.shape[1], p.num_value_heads
    mixed, z, b, a = x.split([conv_dim, p.value_dim, heads, heads])
    window = torch.cat([conv_state, mixed[None]])
    conv_state.copy_(window[1:])
    q, k, v = functional.silu((window * p.conv_weight.to(x.dtype)).sum(0)).split(
        [p.key_dim, p.key_dim, p.value_dim]
    )
    q, k = (_l2_norm(part.view(p.num_key_heads, p.key_head_dim)) for part in (q, k))
    repeats = heads // p.num_key_heads
    q, k = (
        part.repeat(repeats, 1) if p.tiled else part.repeat_interleave(repeats, 0)
        for part in (q * p.key_head_dim**-0.5, k)
    )
    v = v.view(heads, p.value_head_dim)
    g = p.decay.to(x.dtype) * functional.softplus(a + p.dt_bias.to(x.dtype))
    state.mul_(g.exp()[:, None, None])
    delta = (v - torch.einsum("hkv,hk->hv", state, k)) * b.sigmoid()[:, None]
    state.add_(torch.einsum("hk,hv->hkv", k, delta))
    o = torch.einsum("hkv,hk->hv", state, q)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + p.eps) * p.norm_weight.to(x.dtype)
    return (o * functional.silu(z.view(heads, p.value_head_dim))).flatten()


def _l2_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _L2_EPS)
