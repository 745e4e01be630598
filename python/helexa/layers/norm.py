"""Root-mean-square norm with the residual addition before it."""

from torch import Tensor

from helexa import ops
from helexa.layers.linear import Linear, Scope

ALL_ROWS = 1 << 62


class RMSNorm:
    """norm(x); given a residual, residual += x in place and then norm(residual).

    float_rows: results of up to so many rows are there as floats, too.
    """

    def __init__(self, weight: Tensor, eps: float, *, float_rows: int = 0):
        self.weight = weight
        self.eps = eps
        self.float_rows = float_rows

    @classmethod
    def load(cls, scope: Scope, size: int, eps: float, *, float_rows: int = 0) -> "RMSNorm":
        return cls(scope.vector("weight", size), eps, float_rows=float_rows)

    def with_floats(self) -> "RMSNorm":
        """The same, whose results are always there as floats."""
        return RMSNorm(self.weight, self.eps, float_rows=ALL_ROWS)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> ops.Rows:
        keep_float = len(x) <= self.float_rows
        return ops.rms_norm(x, self.weight, self.eps, residual=residual, keep_float=keep_float)

    def after(self, linear: Linear, x: ops.Rows, residual: Tensor) -> ops.Rows:
        """residual += linear(x) in place, and its norm."""
        return ops.matmul_add_norm(
            x,
            linear.weights[0],
            residual,
            self.weight,
            self.eps,
            bias=None if linear.biases is None else linear.biases[0],
            keep_float=len(residual) <= self.float_rows,
        )
