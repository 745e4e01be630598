"""The end of a block of a model: its last product, the residual addition, and the norm of the sum."""

import torch
from torch import Tensor

from helexa import _C
from helexa.ops.activation import MAX_MATVEC_ROWS, Activation, Rows, activation_squares, empty_activation
from helexa.ops.pack import PackedWeight
from helexa.ops.quant_matmul import few_rows, quant_matmul, quant_matmul_reference
from helexa.ops.rms_norm import rms_norm, rms_norm_reference
from helexa.ops.tensor import address, check, check_tensor, on_cuda, stream


def matmul_add_norm(
    x: Rows,
    weight: PackedWeight,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    keep_float: bool = False,
) -> Rows:
    """rms_norm(residual += x · weightᵀ + bias).

    x, weight, bias: as in quant_matmul.   residual: [T, N] float32, changed in place.   norm_weight: [N]
    float32.   keep_float: on CUDA the result has `x` too.
    On CUDA up to MAX_MATVEC_ROWS rows take one launch, which leaves the division by the root mean square to
    whoever multiplies the result (Activation.squares).
    Raises ValueError if a shape or dtype does not fit.  Capturable: allocates only its result.
    """
    num_rows = x.num_rows if isinstance(x, Activation) else x.shape[0]
    is_fused = (isinstance(x, Activation) or on_cuda(x)) and num_rows <= MAX_MATVEC_ROWS
    if not is_fused:
        product = quant_matmul(x, [weight], [bias])
        return rms_norm(product, norm_weight, eps, residual=residual, keep_float=keep_float)
    rows, width = few_rows(x), weight.rows
    assert rows.q8 is not None
    check(
        rows.cols == weight.cols and rows.squares is None,
        lambda: f"matmul_add_norm: weight [{width}, {weight.cols}] does not fit x of {rows.cols} columns",
    )
    check_tensor("matmul_add_norm", "residual", residual, (num_rows, width), torch.float32)
    check_tensor("matmul_add_norm", "norm_weight", norm_weight, (width,), torch.float32)
    if bias is not None:
        check_tensor("matmul_add_norm", "bias", bias, (width,), torch.float32)
    out = empty_activation(num_rows, width, residual.device, keep_float=keep_float)
    out.squares = torch.empty((num_rows, activation_squares(width)), device=residual.device)
    out.eps = eps
    _C.add_norm_matmul_cuda(
        rows.q8.data_ptr(),
        address(rows.x),
        num_rows,
        weight.view if bias is None else weight.view_rows(0, width, bias),
        residual.data_ptr(),
        norm_weight.data_ptr(),
        address(out.q8),
        address(out.x),
        out.squares.data_ptr(),
        stream(residual),
    )
    return out


def matmul_add_norm_reference(
    x: Tensor,
    weight: PackedWeight,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """The same in torch, the product over decoded weights in float64."""
    product = quant_matmul_reference(x, [weight], [bias])
    return rms_norm_reference(product, norm_weight, eps, residual=residual)
