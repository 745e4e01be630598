"""The gated activation of SwiGLU feed-forward layers (Shazeer 2020)."""

import torch
from torch import Tensor
from torch.nn import functional

from helexa import _C
from helexa.ops.activation import Activation, Rows, empty_activation
from helexa.ops.tensor import address, check, check_tensor, dtype_id, on_cuda, stream


def silu_mul(gate_up: Tensor, *, out: Rows | None = None) -> Rows:
    """silu(gate) · up, where gate is the first half of each row and up the second.

    gate_up: [T, 2F] float32, contiguous; on CUDA also bfloat16.   out: no overlap with gate_up; on the CPU
    [T, F] float32, on CUDA an Activation with `q8` or `bf16`.
    Raises ValueError if a shape or dtype does not fit.  Capturable: allocates only `out`.
    """
    check(
        gate_up.ndim == 2 and gate_up.shape[1] % 2 == 0 and gate_up.is_contiguous(),
        lambda: f"silu_mul: gate_up {tuple(gate_up.shape)} is not a contiguous [T, 2F]",
    )
    shape = (gate_up.shape[0], gate_up.shape[1] // 2)
    if on_cuda(gate_up):
        return _on_cuda(gate_up, shape, out)
    check(gate_up.dtype == torch.float32, "silu_mul: on the CPU gate_up has to be float32")
    out = torch.empty(shape, dtype=torch.float32) if out is None else out
    if not isinstance(out, Tensor):
        raise ValueError("silu_mul: on the CPU out is a tensor")
    check_tensor("silu_mul", "out", out, shape, torch.float32)
    _C.silu_mul_cpu(gate_up.data_ptr(), out.data_ptr(), *shape)
    return out


def _on_cuda(gate_up: Tensor, shape: tuple[int, int], out: Rows | None) -> Activation:
    check(
        gate_up.dtype in (torch.float32, torch.bfloat16),
        lambda: f"silu_mul: gate_up is {gate_up.dtype}; expected float32 or bfloat16",
    )
    if out is None:
        out = empty_activation(*shape, gate_up.device)
    elif (
        not isinstance(out, Activation)
        or (out.num_rows, out.cols) != shape
        or (out.q8 is None) == (out.bf16 is None)
    ):
        raise ValueError(f"silu_mul: on CUDA out is an Activation of {shape} with q8 or bf16")
    forms = address(out.q8), address(out.bf16)
    _C.silu_mul_cuda(gate_up.data_ptr(), dtype_id(gate_up), *forms, *shape, stream(gate_up))
    return out


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """The same in torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
