"""Input times quantized weight matrices, in the packed layout."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from helexa import _C
from helexa.ops.activation import MAX_MATVEC_ROWS, Activation, Rows, empty_activation, quantize_rows
from helexa.ops.dequantize import unpacked_matmul
from helexa.ops.pack import PackedWeight
from helexa.ops.silu_mul import silu_mul
from helexa.ops.tensor import address, check, check_tensor, dtype_id, on_cuda, stream

Biases = Sequence[Tensor | None] | None

# On CUDA, of more than MAX_MATVEC_ROWS: up to here packed weights are multiplied by many rows in one launch,
# beyond they are first unpacked.
MAX_MIDDLE_ROWS = 256

_MAX_WEIGHTS = 8  # of one launch on a device
_FLOATS = ("f32", "f16", "bf16")

_thread = threading.local()  # its workspaces, by device: a thread uses one stream at a time


def quant_matmul(
    x: Rows,
    weights: Sequence[PackedWeight],
    biases: Biases = None,
    *,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """[x · w₀ᵀ + b₀ | x · w₁ᵀ + b₁ | …] for weights that share the input x.

    x: [T, K] float32, contiguous; on CUDA an Activation, and a tensor is first made one.
    weights: [Nᵢ, K] each, of any formats.   biases: [Nᵢ] float32 or None each.
    out: [T, ΣNᵢ], not x; float32, but on CUDA of more than MAX_MATVEC_ROWS rows bfloat16 unless `dtype` is
    float32.
    Quantized formats see x rounded to int8 with one scale per 32 columns (absmax / 127) and sum in float32;
    float formats compute in float32, on CUDA with the exact x where the Activation has it.  Many rows on CUDA
    are multiplied in bfloat16, weights rounded to it too, with float32 sums.
    Up to MAX_MATVEC_ROWS rows, a row's result does not depend on the rows beside it; beyond, the order of its
    sums depends on their number.
    Raises ValueError if a shape or dtype does not fit.  Capturable: allocates only `out`.
    """
    if isinstance(x, Activation) or on_cuda(x):
        return _on_cuda(x, weights, biases, out, dtype)
    check(dtype in (None, torch.float32), lambda: f"quant_matmul: on the CPU out is float32, not {dtype}")
    check(
        x.ndim == 2 and x.dtype == torch.float32 and x.is_contiguous(),
        "quant_matmul: x must be contiguous float32",
    )
    views, shape = _views(weights, biases, x.shape[1]), (x.shape[0], _total_rows(weights))
    out = torch.empty(shape) if out is None else out
    check_tensor("quant_matmul", "out", out, shape, torch.float32)
    check(shape[0] == 0 or out.data_ptr() != x.data_ptr(), "quant_matmul: out is not memory of its own")
    _C.quant_matmul_cpu(x.data_ptr(), shape[0], views, out.data_ptr())
    return out


def gated_matmul(x: Rows, weights: Sequence[PackedWeight], biases: Biases = None) -> Rows:
    """silu(x · w₀ᵀ + b₀) · (x · w₁ᵀ + b₁), the input of the next matmul.

    x and weights as in quant_matmul; two weights of the same shape.   Returns [T, N]: float32 on the CPU, an
    Activation on CUDA.  Raises ValueError if a shape or dtype does not fit.
    """
    check(
        len(weights) == 2 and weights[0].rows == weights[1].rows,
        "gated_matmul: there have to be two weights with as many rows",
    )
    num_rows = x.num_rows if isinstance(x, Activation) else x.shape[0]
    is_fused = (isinstance(x, Activation) or on_cuda(x)) and num_rows <= MAX_MATVEC_ROWS
    if not is_fused:
        if isinstance(x, Activation) and _is_middle(x, weights):
            out = empty_activation(num_rows, weights[0].rows, weights[0].data.device)
            assert out.bf16 is not None
            _middle_matmul(x, weights, biases, out.bf16, gated=True)
            return out
        return silu_mul(quant_matmul(x, weights, biases))
    rows = few_rows(x)
    out = empty_activation(num_rows, weights[0].rows, weights[0].data.device)
    assert out.q8 is not None
    views = _views(weights, biases, rows.cols)
    _C.gated_matmul_cuda(*_addresses(rows), num_rows, views, out.q8.data_ptr(), stream(out.q8))
    return out


def _on_cuda(
    x: Rows, weights: Sequence[PackedWeight], biases: Biases, out: Tensor | None, dtype: torch.dtype | None
) -> Tensor:
    num_rows = x.num_rows if isinstance(x, Activation) else x.shape[0]
    is_few = num_rows <= MAX_MATVEC_ROWS
    wanted = dtype or (torch.float32 if is_few else torch.bfloat16)
    check(
        wanted == torch.float32 or (wanted == torch.bfloat16 and not is_few),
        lambda: f"quant_matmul: {num_rows} rows on CUDA cannot make {dtype}",
    )
    shape = (num_rows, _total_rows(weights))
    out = torch.empty(shape, dtype=wanted, device=weights[0].data.device) if out is None else out
    check_tensor("quant_matmul", "out", out, shape, wanted)
    if is_few:
        check(len(weights) <= _MAX_WEIGHTS, lambda: f"quant_matmul: more than {_MAX_WEIGHTS} weights")
        rows = few_rows(x)
        views = _views(weights, biases, rows.cols)
        _C.quant_matmul_cuda(*_addresses(rows), num_rows, views, out.data_ptr(), stream(out))
    else:
        rows = x if isinstance(x, Activation) else quantize_rows(x)
        check(rows.bf16 is not None, lambda: f"quant_matmul: {num_rows} rows on CUDA have to be bfloat16")
        assert rows.bf16 is not None
        if _is_middle(rows, weights):
            _middle_matmul(rows, weights, biases, out, gated=False)
        else:
            unpacked_matmul(rows.bf16, weights, biases, out)
    return out


def _is_middle(x: Activation, weights: Sequence[PackedWeight]) -> bool:
    """Whether many rows are multiplied with the packed weights."""
    return (
        x.bf16 is not None
        and MAX_MATVEC_ROWS < x.num_rows <= MAX_MIDDLE_ROWS
        and x.cols % 8 == 0
        and len(weights) <= _MAX_WEIGHTS
        and any(weight.format not in _FLOATS for weight in weights)
    )


def _middle_matmul(
    x: Activation, weights: Sequence[PackedWeight], biases: Biases, out: Tensor, *, gated: bool
) -> None:
    assert x.bf16 is not None
    check(x.bf16.is_contiguous(), "quant_matmul: the rows of x must be contiguous")
    views = _views(weights, biases, x.cols)
    workspace = _workspace(out.device)
    _C.middle_matmul_cuda(
        x.bf16.data_ptr(),
        x.num_rows,
        views,
        gated,
        out.data_ptr(),
        dtype_id(out),
        workspace.data_ptr(),
        stream(out),
    )


def _workspace(device: torch.device) -> Tensor:
    """The thread's own on the device; every call leaves it as it has to find it."""
    workspaces: dict[torch.device, Tensor] = vars(_thread).setdefault("workspaces", {})
    workspace = workspaces.get(device)
    if workspace is None:
        size = _C.middle_matmul_workspace_bytes()
        workspace = workspaces[device] = torch.zeros(size, dtype=torch.uint8, device=device)
    return workspace


def few_rows(x: Rows) -> Activation:
    """x with int8 rows; those of a slice of many rows are made here."""
    if isinstance(x, Tensor):
        return quantize_rows(x)
    if x.q8 is not None:
        check(x.q8.is_contiguous(), "quant_matmul: the rows of x must be contiguous")
        return x
    assert x.bf16 is not None
    return quantize_rows(x.bf16)


def _addresses(rows: Activation) -> tuple[int, int, int, float]:
    assert rows.q8 is not None
    return rows.q8.data_ptr(), address(rows.x), address(rows.squares), rows.eps


def _views(weights: Sequence[PackedWeight], biases: Biases, cols: int) -> list[_C.WeightView]:
    check(len(weights) > 0, "quant_matmul: there are no weights")
    for weight in weights:
        if weight.cols != cols:
            shape = [weight.rows, weight.cols]
            raise ValueError(f"quant_matmul: weight {shape} does not fit x of {cols} columns")
    if biases is None:
        return [weight.view for weight in weights]
    views = []
    for weight, bias in zip(weights, biases, strict=True):
        check(
            bias is None or (bias.shape == (weight.rows,) and bias.dtype == torch.float32),
            "quant_matmul: a bias does not have a float32 for each row of its weight",
        )
        views.append(weight.view_rows(0, weight.rows, bias))
    return views


def _total_rows(weights: Sequence[PackedWeight]) -> int:
    return sum(weight.rows for weight in weights)


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
