"""Root-mean-square norm over the last axis (Zhang & Sennrich 2019, eq. 4), also after a residual addition."""

import torch
from torch import Tensor

from helexa import _C
from helexa.ops.tensor import check, dtype_id, on_cuda, stream


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """y = x · weight / sqrt(mean(x²) + eps), summed in float32.  With a residual, residual += x replaces x.

    x: [T, D] float32 (on CUDA also bfloat16, float16), contiguous.   weight: [D] float32.
    residual: like x, changed in place.   out: like x; may be x itself.
    Raises ValueError if a shape, dtype or device does not fit.  Capturable: allocates only `out`.
    """
    check(x.ndim == 2 and x.is_contiguous(), f"rms_norm: x {tuple(x.shape)} is not a contiguous [T, D]")
    check(
        on_cuda(x) or x.dtype == torch.float32, f"rms_norm: x is {x.dtype}; on the CPU it has to be float32"
    )
    check(
        weight.shape == x.shape[-1:] and weight.dtype == torch.float32 and weight.is_contiguous(),
        f"rms_norm: weight {tuple(weight.shape)} {weight.dtype} does not fit x {tuple(x.shape)}",
    )
    check(weight.device == x.device, f"rms_norm: weight is on {weight.device}, x on {x.device}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _check_like("out", out, x)
    if residual is not None:
        _check_like("residual", residual, x)
    residual_ptr = 0 if residual is None else residual.data_ptr()
    pointers = (x.data_ptr(), weight.data_ptr(), residual_ptr, out.data_ptr())
    num_tokens, width = x.shape
    if on_cuda(x):
        _C.rms_norm_cuda(*pointers, num_tokens, width, dtype_id(x), eps, stream(x))
    else:
        _C.rms_norm_cpu(*pointers, num_tokens, width, eps)
    return out


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None) -> Tensor:
    """The same in torch."""
    if residual is not None:
        x = residual.add_(x)
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    fits = (
        tensor.shape == x.shape
        and tensor.dtype == x.dtype
        and tensor.device == x.device
        and tensor.is_contiguous()
    )
    check(
        fits,
        f"rms_norm: {name} {tuple(tensor.shape)} {tensor.dtype} on {tensor.device} is not like x",
    )
