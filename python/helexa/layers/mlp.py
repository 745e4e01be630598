"""Gated feed-forward block (SwiGLU, Shazeer 2020)."""

from torch import Tensor

from helexa import ops
from helexa.layers.linear import Linear, Scope
from helexa.layers.norm import RMSNorm


class MLP:
    """down(silu(gate(x)) · up(x)), gate and up as one matmul."""

    def __init__(self, scope: Scope, hidden_size: int, intermediate_size: int):
        rows = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = Linear.load(scope, hidden_size, rows)
        self.down_proj = Linear.load(scope, intermediate_size, {"down_proj": hidden_size})

    def __call__(self, x: ops.Rows, residual: Tensor, norm: RMSNorm) -> ops.Rows:
        """Adds the block's output to residual, and the norm of that."""
        hidden = ops.gated_matmul(x, self.gate_up_proj.weights, self.gate_up_proj.biases)
        return norm.after(self.down_proj, hidden, residual)
