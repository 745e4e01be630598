"""What matmuls on a CUDA device take as their input: rows in the forms that the kernels read."""

from dataclasses import dataclass

from torch import Tensor

MAX_MATVEC_ROWS = (
    64  # up to here weights are multiplied as they are, beyond they are first unpacked to bfloat16
)


@dataclass(frozen=True, eq=False)
class Activation:
    """T rows of `cols` values; who produces them writes the forms, so that no launch is spent on conversion.

    q8: [T, bytes] uint8, int8 codes with their scales (csrc/ops/activation.cuh); of up to MAX_MATVEC_ROWS rows.
    bf16: [T, cols] bfloat16; of more rows.
    x: [T, cols] float32, only where somebody wants it besides, such as the router of a mixture of experts.
    """

    cols: int
    q8: Tensor | None = None
    bf16: Tensor | None = None
    x: Tensor | None = None

    def __getitem__(self, rows: slice) -> "Activation":
        """The same of some of the rows."""
        forms = [None if form is None else form[rows] for form in (self.q8, self.bf16, self.x)]
        return Activation(self.cols, *forms)

    @property
    def num_rows(self) -> int:
        """T."""
        return next(form.shape[0] for form in (self.q8, self.bf16, self.x) if form is not None)


# What a layer hands to the next matmul: plain float32 rows [T, cols] on the CPU, an Activation on CUDA.
Rows = Tensor | Activation
