"""The gated activation of SwiGLU feed-forward layers (Shazeer 2020)."""

import torch
from torch import Tensor
from torch.nn import functional

from helexa import _C
from helexa.ops.tensor import check


def silu_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(gate) · up, where gate is the first half of each row and up the second.

    gate_up: [T, 2F] float32, contiguous.   out: [T, F] float32, no overlap with gate_up.
    Raises ValueError if a shape or dtype does not fit.  Capturable: allocates only `out`.
    """
    check(
        gate_up.ndim == 2 and gate_up.shape[1] % 2 == 0 and gate_up.is_contiguous(),
        f"silu_mul: gate_up {tuple(gate_up.shape)} is not a contiguous [T, 2F]",
    )
    check(
        gate_up.dtype == torch.float32 and not gate_up.is_cuda,
        "silu_mul: gate_up has to be float32 on the CPU",
    )
    shape = (gate_up.shape[0], gate_up.shape[1] // 2)
    out = torch.empty(shape, dtype=torch.float32) if out is None else out
    check(
        out.shape == shape and out.dtype == torch.float32 and out.is_contiguous(),
        f"silu_mul: out {tuple(out.shape)} {out.dtype} is not a contiguous {shape} float32",
    )
    _C.silu_mul_cpu(gate_up.data_ptr(), out.data_ptr(), *shape)
    return out


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """The same in torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
