"""Root-mean-square norm with the residual addition before it."""

from torch import Tensor

from helexa import ops
from helexa.layers.linear import Scope


class RMSNorm:
    """norm(x); given a residual, residual += x in place and then norm(residual)."""

    def __init__(self, weight: Tensor, eps: float):
        self.weight = weight
        self.eps = eps

    @classmethod
    def load(cls, scope: Scope, size: int, eps: float) -> "RMSNorm":
        return cls(scope.vector("weight", size), eps)

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, keep_float: bool = False) -> ops.Rows:
        return ops.rms_norm(x, self.weight, self.eps, residual=residual, keep_float=keep_float)
