"""Root-mean-square norm over the last axis (Zhang & Sennrich 2019, eq. 4), also after a residual addition."""

import torch
from torch import Tensor

from helexa import _C
from helexa.ops.activation import Activation, Rows, empty_activation
from helexa.ops.tensor import address, check, check_device, check_tensor, dtype_id, on_cuda, stream

MAX_CUDA_WIDTH = 16384  # a block of a device keeps a row in registers


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    out: Rows | None = None,
    keep_float: bool = False,
) -> Rows:
    """y = x · weight / sqrt(mean(x²) + eps), summed in float32.  With a residual, residual += x replaces x.

    x: [T, D] float32, contiguous; on CUDA also bfloat16.   weight: [D] float32.   residual: [T, D] float32,
    changed in place.   out: on the CPU like x, or x itself; on CUDA an Activation, of which every form that
    is there is written.   keep_float: on CUDA the result has `x` too.
    Raises ValueError if a shape, dtype or device does not fit.  Capturable: allocates only `out`.
    """
    shape = x.shape
    check(
        len(shape) == 2 and x.is_contiguous(),
        lambda: f"rms_norm: x {tuple(shape)} is not a contiguous [T, D]",
    )
    check_tensor("rms_norm", "weight", weight, shape[1:], torch.float32)
    check_device("rms_norm", "weight", weight, x)
    if residual is not None:
        check_tensor("rms_norm", "residual", residual, shape, torch.float32)
        check_device("rms_norm", "residual", residual, x)
    if on_cuda(x):
        return _on_cuda(x, weight, eps, residual, out, keep_float)
    check(x.dtype == torch.float32, lambda: f"rms_norm: x is {x.dtype}; on the CPU it has to be float32")
    out = torch.empty(shape) if out is None else out
    if not isinstance(out, Tensor):
        raise ValueError("rms_norm: on the CPU out is a tensor")
    check_tensor("rms_norm", "out", out, shape, torch.float32)
    _C.rms_norm_cpu(
        x.data_ptr(), weight.data_ptr(), address(residual), out.data_ptr(), shape[0], shape[1], eps
    )
    return out


def _on_cuda(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Rows | None, keep_float: bool
) -> Activation:
    num_tokens, width = x.shape
    check(
        x.dtype in (torch.float32, torch.bfloat16),
        lambda: f"rms_norm: x is {x.dtype}; expected float32 or bfloat16",
    )
    check(
        0 < width <= MAX_CUDA_WIDTH,
        lambda: f"rms_norm: rows of {width} values; a device takes up to {MAX_CUDA_WIDTH}",
    )
    if out is None:
        out = empty_activation(num_tokens, width, x.device, keep_float=keep_float)
    elif not isinstance(out, Activation) or out.num_rows != num_tokens or out.cols != width:
        raise ValueError(f"rms_norm: on CUDA out is an Activation of {tuple(x.shape)}")
    _C.rms_norm_cuda(
        x.data_ptr(),
        dtype_id(x),
        weight.data_ptr(),
        address(residual),
        address(out.q8),
        address(out.bf16),
        address(out.x),
        num_tokens,
        width,
        eps,
        stream(x),
    )
    return out


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None) -> Tensor:
    """The same in torch."""
    y = x.float() if residual is None else residual.add_(x)
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight
