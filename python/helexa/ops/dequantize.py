"""Weight matrices of a CUDA device unpacked to plain numbers, and products of many rows with them.

With enough rows the tensor cores limit a product, and no longer the reading of weights. These are unpacked
to bfloat16 then, a part that fits a scratch at a time, and multiplied by torch.mm.
"""

import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from helexa import _C
from helexa.ops.pack import TILE_ROWS, PackedWeight
from helexa.ops.tensor import DTYPE_IDS, check, dtype_id, stream

# Bounds the scratch of each model on a device; the down projection of 8 billion weights fits at once.
SCRATCH_BYTES = 96 << 20
# What a part has at least where the scratch allows: two waves of 128 x 128 outputs on 132 multiprocessors.
# With more rows of input a part needs fewer rows of weights for that, and may stay in the second-level cache.
_PART_OUTPUTS = 2 * 132 * 128 * 128
_CACHED_BYTES = 32 << 20
_PART_STEP = 256  # rows; keeps parts whole tiles of the products

_BFLOAT16 = DTYPE_IDS[torch.bfloat16]
_FLOATS = ("f32", "f16", "bf16")
_Piece = tuple[PackedWeight, int, int]  # first row and end

_thread = threading.local()  # its scratches, by device: a thread uses one stream at a time


def dequantize_rows(weight: PackedWeight, first_row: int, num_rows: int, out: Tensor) -> Tensor:
    """out[n] = row first_row + n of the weight.

    out: [num_rows, K] float32 or bfloat16 (rounded to nearest even), its rows may lie apart.
    first_row: a multiple of 16.
    Raises ValueError if a shape or dtype does not fit.  Capturable.
    """
    check(
        out.shape == (num_rows, weight.cols) and out.stride(1) == 1 and out.device == weight.data.device,
        lambda: (
            f"dequantize: out {tuple(out.shape)} is not [{num_rows}, {weight.cols}] on {weight.data.device}"
        ),
    )
    check(
        weight.format in _FLOATS or (out.stride(0) % 4 == 0 and out.data_ptr() % 16 == 0),
        "dequantize: the rows of out are not aligned",
    )
    end = first_row + num_rows
    check(
        first_row % TILE_ROWS == 0 and first_row >= 0 and end <= weight.rows,
        lambda: f"dequantize: rows {first_row} … {end} are not in tiles of {weight.rows} rows",
    )
    view = weight.view_rows(first_row, end)
    _C.dequantize_cuda([view], out.data_ptr(), out.stride(0), dtype_id(out), stream(out))
    return out


def unpacked_matmul(
    x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None] | None, out: Tensor
) -> Tensor:
    """[x · w₀ᵀ + b₀ | x · w₁ᵀ + b₁ | …] in bfloat16 with float32 sums.

    x: [T, K] bfloat16, contiguous.   biases: [Nᵢ] float32 or None each.   out: [T, ΣNᵢ] bfloat16 or float32.
    Raises ValueError if a shape or dtype does not fit.
    """
    check(x.dtype == torch.bfloat16 and x.is_contiguous(), "unpacked_matmul: x must be contiguous bfloat16")
    total = _total_rows(weights, x)
    check(
        out.shape == (x.shape[0], total),
        lambda: f"unpacked_matmul: out {tuple(out.shape)} has no {total} columns",
    )
    scratch, column = _scratch(x.device, x.shape[1]), 0
    for part in _parts(weights, min(_part_rows(x), _rows_of(scratch, x.shape[1]))):
        matrix = _unpacked(part, scratch, x)
        end = column + matrix.shape[0]
        _multiply(x, matrix, out if end - column == total else out[:, column:end])
        column = end
    if biases is not None:
        column = 0
        for weight, bias in zip(weights, biases, strict=True):
            if bias is not None:
                out[:, column : column + weight.rows] += bias
            column += weight.rows
    return out


def unpacked_matmul_reference(
    x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None] | None = None
) -> Tensor:
    """The same in float64 over weights rounded to bfloat16."""
    biases = [None] * len(weights) if biases is None else biases
    outs = []
    for weight, bias in zip(weights, biases, strict=True):
        y = x.double() @ weight.dequantize().bfloat16().double().T
        outs.append(y if bias is None else y + bias.double())
    return torch.cat(outs, 1)


def _total_rows(weights: Sequence[PackedWeight], x: Tensor) -> int:
    total, cols = 0, x.shape[1]
    for weight in weights:
        if weight.cols != cols:
            shape = [weight.rows, weight.cols]
            raise ValueError(f"quant_matmul: weight {shape} does not fit x {tuple(x.shape)}")
        total += weight.rows
    return total


def _scratch(device: torch.device, cols: int) -> Tensor:
    """The thread's scratch on the device, [numbers], with room for a tile of such rows at least."""
    scratches: dict[torch.device, Tensor] = vars(_thread).setdefault("scratches", {})
    scratch = scratches.get(device)
    if scratch is None or scratch.numel() < TILE_ROWS * cols:
        size = max(SCRATCH_BYTES // 2, TILE_ROWS * cols)
        scratch = scratches[device] = torch.empty(size, dtype=torch.bfloat16, device=device)
    return scratch


def _rows_of(scratch: Tensor, cols: int) -> int:
    """How many rows fit, whole tiles of them."""
    return scratch.numel() // cols // TILE_ROWS * TILE_ROWS


def _part_rows(x: Tensor) -> int:
    """How many rows of weights are best unpacked at a time for the input x."""
    num_rows, cols = x.shape
    wanted = max(_CACHED_BYTES // (2 * cols), _PART_OUTPUTS // max(num_rows, 1), 1)
    return -(-wanted // _PART_STEP) * _PART_STEP


def _parts(weights: Sequence[PackedWeight], most: int) -> Iterator[list[_Piece]]:
    """The weights' rows in parts of at most `most`, which is whole tiles."""
    part: list[_Piece] = []
    room = most
    for weight in weights:
        first = 0
        while first < weight.rows:
            left = weight.rows - first
            end = first + (left if left <= room else room // TILE_ROWS * TILE_ROWS)
            if end > first:
                part.append((weight, first, end))
                room, first = room - (end - first), end
            if first < weight.rows:
                yield part
                part, room = [], most
    yield part


def _unpacked(part: Sequence[_Piece], scratch: Tensor, x: Tensor) -> Tensor:
    """The rows of a part as one bfloat16 matrix, which lives until the next part."""
    weight, first, end = part[0]
    if len(part) == 1 and weight.format == "bf16":  # lies as it is multiplied
        return weight.data.view(torch.bfloat16).view(weight.rows, weight.cols)[first:end]
    views, num_rows, cols = [], 0, x.shape[1]
    for weight, first, end in part:
        views.append(weight.view if end - first == weight.rows else weight.view_rows(first, end))
        num_rows += end - first
    _C.dequantize_cuda(views, scratch.data_ptr(), cols, _BFLOAT16, stream(x))
    return scratch.as_strided((num_rows, cols), (cols, 1))


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x · weightᵀ."""
    if x.is_cuda and out.dtype == torch.float32:
        torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
    elif x.is_cuda:
        torch.mm(x, weight.t(), out=out)
    else:  # emulated: the CPU's bfloat16 products may round in between
        out.copy_(x.float() @ weight.float().t())
