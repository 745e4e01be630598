"""What matmuls on a CUDA device take as their input: rows in the forms that the kernels read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from helexa import _C
from helexa.ops.tensor import check, dtype_id, stream

MAX_MATVEC_ROWS = 16  # up to here weights are multiplied in int8, beyond in bfloat16
_ALL_ROWS = slice(None)


@dataclass(slots=True, eq=False)
class Activation:
    """T rows of `cols` values; who produces them writes the forms, so that no launch is spent on conversion.

    q8: [T, bytes] uint8, int8 codes with their scales (csrc/ops/activation.cuh); of up to MAX_MATVEC_ROWS
    rows.
    bf16: [T, cols] bfloat16; of more rows.
    x: [T, cols] float32, only where somebody wants it besides, such as the router of a mixture of experts.
    squares: [T, activation_squares(cols)] float32 of rows whose norm is not finished: the forms are to be
    multiplied by 1 / sqrt(sum of squares / cols + eps), and whoever multiplies them by a matrix does that to
    the products.
    """

    cols: int
    q8: Tensor | None = None
    bf16: Tensor | None = None
    x: Tensor | None = None
    squares: Tensor | None = None
    eps: float = 0.0

    def __getitem__(self, rows: slice) -> "Activation":
        """The same of some of the rows."""
        if rows == _ALL_ROWS:
            return self
        q8, bf16, x, squares = (
            None if form is None else form[rows] for form in (self.q8, self.bf16, self.x, self.squares)
        )
        return Activation(self.cols, q8, bf16, x, squares, self.eps)

    @property
    def num_rows(self) -> int:
        """T."""
        form = self.q8 if self.q8 is not None else self.bf16 if self.bf16 is not None else self.x
        assert form is not None
        return form.size(0)

    def factors(self) -> Tensor | float:
        """[T, 1] float32 that end the norm; 1 if there is nothing to end."""
        if self.squares is None:
            return 1.0
        return (self.squares.sum(1, keepdim=True) / self.cols + self.eps).rsqrt()

    def values(self) -> Tensor:
        """[T, cols] float32, as matmuls see them."""
        if self.q8 is None:
            form = self.bf16 if self.bf16 is not None else self.x
            assert form is not None
            return form.float() * self.factors()
        num_groups = -(-self.cols // 64)
        codes, scales = self.q8.split([64 * num_groups, 16 * num_groups], dim=1)
        columns = torch.arange(64 * num_groups, device=self.q8.device)
        lane, half, quarter = columns % 16 // 4 * 16, columns % 64 // 32 * 8, columns % 32 // 16 * 4
        places = columns - columns % 64 + lane + half + quarter + columns % 4
        ordered = codes.view(torch.int8)[:, places].float().unflatten(1, (-1, 32))
        factors = scales.contiguous().view(torch.float32).unflatten(1, (-1, 2))[:, :, :1]
        return (ordered * factors).flatten(1)[:, : self.cols] * self.factors()


# What a layer hands to the next matmul: plain float32 rows [T, cols] on the CPU, an Activation on CUDA.
Rows = Tensor | Activation


def activation_row_bytes(cols: int) -> int:
    """Bytes of a row of `q8`: a code per column of 64 at a time, and 16 bytes of scales for these."""
    return -(-cols // 64) * 80


def activation_squares(cols: int) -> int:
    """Sums of squares of a row whose norm is not finished: one for each 32 columns, in fours."""
    return -(-cols // 128) * 4


def empty_activation(
    num_rows: int, cols: int, device: torch.device, *, keep_float: bool = False
) -> Activation:
    """An Activation to be written: `q8` for few rows, `bf16` for more; keep_float: also `x`."""
    q8 = bf16 = None
    if num_rows <= MAX_MATVEC_ROWS:
        q8 = torch.empty((num_rows, activation_row_bytes(cols)), dtype=torch.uint8, device=device)
    else:
        bf16 = torch.empty((num_rows, cols), dtype=torch.bfloat16, device=device)
    x = torch.empty((num_rows, cols), dtype=torch.float32, device=device) if keep_float else None
    return Activation(cols, q8, bf16, x)


def as_float(rows: Rows) -> Tensor:
    """[T, cols] float32, exact if they were computed with keep_float."""
    if isinstance(rows, Tensor):
        return rows
    if rows.x is None:
        return rows.values()
    return rows.x if rows.squares is None else rows.x * rows.factors()


def quantize_rows(x: Tensor) -> Activation:
    """Rows on a CUDA device as the input of matmuls.

    Few rows have `q8`, and `x` itself if that is float32; more have `bf16`.

    x: [T, K] float32 or bfloat16, contiguous.  Raises ValueError if a shape or dtype does not fit.
    """
    check(
        x.ndim == 2 and x.is_contiguous() and x.dtype in (torch.float32, torch.bfloat16),
        lambda: f"quantize_rows: x {tuple(x.shape)} {x.dtype} is not contiguous float32 or bfloat16 rows",
    )
    num_rows, cols = x.shape
    if num_rows > MAX_MATVEC_ROWS:
        return Activation(cols, bf16=x.bfloat16())
    rows = empty_activation(num_rows, cols, x.device)
    assert rows.q8 is not None
    _C.quantize_rows_cuda(x.data_ptr(), num_rows, cols, dtype_id(x), rows.q8.data_ptr(), stream(x))
    return Activation(cols, q8=rows.q8, x=x if x.dtype == torch.float32 else None)
