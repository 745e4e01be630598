"""Input times quantized weight matrices, in the packed layout."""

from collections.abc import Sequence

import torch
from torch import Tensor

from helexa import _C
from helexa.ops.pack import FORMAT_IDS, PackedWeight
from helexa.ops.tensor import check


def quant_matmul(
    x: Tensor,
    weights: Sequence[PackedWeight],
    biases: Sequence[Tensor | None] | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """[x · w₀ᵀ + b₀ | x · w₁ᵀ + b₁ | …] for weights that share the input x.

    x: [T, K] float32, contiguous.   weights: [Nᵢ, K] each, of any formats.   biases: [Nᵢ] float32 or None
    each.
    out: [T, ΣNᵢ] float32, not x.
    Quantized formats see x rounded to int8 with one scale per 32 columns (absmax / 127) and sum in float32;
    float formats
    compute in float32.  Raises ValueError if a shape or dtype does not fit.  Capturable: allocates only
    `out`.
    """
    num_tokens, cols = x.shape
    check(x.dtype == torch.float32 and x.is_contiguous(), "quant_matmul: x must be contiguous float32")
    biases = [None] * len(weights) if biases is None else biases
    views = []
    for weight, bias in zip(weights, biases, strict=True):
        check(
            weight.cols == cols,
            f"quant_matmul: weight [{weight.rows}, {weight.cols}] does not fit x {tuple(x.shape)}",
        )
        check(
            bias is None or (bias.shape == (weight.rows,) and bias.dtype == torch.float32),
            f"quant_matmul: a bias is not [{weight.rows}] float32",
        )
        views.append(
            _C.WeightView(
                FORMAT_IDS[weight.format],
                weight.data.data_ptr(),
                weight.rows,
                weight.cols,
                0 if bias is None else bias.data_ptr(),
            )
        )
    total = sum(weight.rows for weight in weights)
    out = torch.empty(num_tokens, total) if out is None else out
    check(
        out.shape == (num_tokens, total)
        and out.is_contiguous()
        and (num_tokens == 0 or out.data_ptr() != x.data_ptr()),
        f"quant_matmul: out {tuple(out.shape)} is not a contiguous [{num_tokens}, {total}] of its own",
    )
    _C.quant_matmul_cpu(x.data_ptr(), num_tokens, views, out.data_ptr())
    return out


def quantize_input_reference(x: Tensor) -> Tensor:
    """x as the integer kernels see it: [T, K] rounded to int8 multiples of absmax / 127 per 32 columns
    (float64)."""
    blocks = x.reshape(x.shape[0], -1, 32)
    most = blocks.abs().amax(-1, keepdim=True)
    # torch computes scalar / tensor as a product with the reciprocal, which rounds twice.
    inverse = torch.where(most > 0, torch.full_like(most, 127.0) / most, torch.zeros_like(most))
    codes = torch.round(blocks * inverse)
    return (codes.double() * (most / torch.full_like(most, 127.0)).double()).reshape(x.shape)


def quant_matmul_reference(
    x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None] | None = None
) -> Tensor:
    """The same in float64 over decoded weights, with the input rounded as the kernels round it."""
    biases = [None] * len(weights) if biases is None else biases
    outs = []
    for weight, bias in zip(weights, biases, strict=True):
        is_float = weight.format in ("f32", "f16", "bf16")
        seen = x.double() if is_float else quantize_input_reference(x)
        y = seen @ weight.dequantize().double().T
        outs.append(y if bias is None else y + bias.double())
    return torch.cat(outs, 1).float()
