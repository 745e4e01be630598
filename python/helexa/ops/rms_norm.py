"""Root-mean-square norm over the last axis (Zhang & Sennrich 2019, eq. 4), also after a residual addition."""

import torch
from torch import Tensor

from helexa import _C
from helexa.ops.activation import Activation, Rows, empty_activation
from helexa.ops.tensor import check, dtype_id, on_cuda, stream

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
    check(x.ndim == 2 and x.is_contiguous(), f"rms_norm: x {tuple(x.shape)} is not a contiguous [T, D]")
    check(
        weight.shape == x.shape[-1:] and weight.dtype == torch.float32 and weight.is_contiguous(),
        f"rms_norm: weight {tuple(weight.shape)} {weight.dtype} does not fit x {tuple(x.shape)}",
    )
    check(weight.device == x.device, f"rms_norm: weight is on {weight.device}, x on {x.device}")
    if residual is not None:
        _check_floats("residual", residual, x)
    if on_cuda(x):
        return _on_cuda(x, weight, eps, residual, out, keep_float)
    check(x.dtype == torch.float32, f"rms_norm: x is {x.dtype}; on the CPU it has to be float32")
    out = torch.empty(x.shape) if out is None else out
    check(isinstance(out, Tensor), "rms_norm: on the CPU out is a tensor")
    _check_floats("out", out, x)
    residual_ptr = 0 if residual is None else residual.data_ptr()
    _C.rms_norm_cpu(x.data_ptr(), weight.data_ptr(), residual_ptr, out.data_ptr(), *x.shape, eps)
    return out


def _on_cuda(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Rows | None, keep_float: bool
) -> Activation:
    num_tokens, width = x.shape
    check(
        x.dtype in (torch.float32, torch.bfloat16), f"rms_norm: x is {x.dtype}; expected float32 or bfloat16"
    )
    check(
        0 < width <= MAX_CUDA_WIDTH,
        f"rms_norm: rows of {width} values; a device takes up to {MAX_CUDA_WIDTH}",
    )
    if out is None:
        out = empty_activation(num_tokens, width, x.device, keep_float=keep_float)
    check(
        isinstance(out, Activation) and out.num_rows == num_tokens and out.cols == width,
        f"rms_norm: on CUDA out is an Activation of {tuple(x.shape)}",
    )
    written = [0 if form is None else form.data_ptr() for form in (out.q8, out.bf16, out.x)]
    residual_ptr = 0 if residual is None else residual.data_ptr()
    source = (x.data_ptr(), dtype_id(x), weight.data_ptr(), residual_ptr)
    _C.rms_norm_cuda(*source, *written, num_tokens, width, eps, stream(x))
    return out


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None) -> Tensor:
    """The same in torch."""
    y = x.float() if residual is None else residual.add_(x)
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight


def _check_floats(name: str, tensor: Tensor, x: Tensor) -> None:
    fits = (
        tensor.shape == x.shape
        and tensor.dtype == torch.float32
        and tensor.device == x.device
        and tensor.is_contiguous()
    )
    check(
        fits,
        f"rms_norm: {name} {tuple(tensor.shape)} {tensor.dtype} on {tensor.device} is not float32 like x",
    )
