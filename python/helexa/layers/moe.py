"""Sparse mixture of experts, with a shared expert where the model has one."""

from torch import Tensor

from helexa import ops
from helexa.layers.linear import Scope
from helexa.layers.mlp import MLP
from helexa.layers.norm import RMSNorm


class SparseMoE:
    """The top_k experts of each token, weighted by the router; the shared expert sees every token."""

    def __init__(
        self,
        scope: Scope,
        hidden_size: int,
        *,
        num_experts: int,
        top_k: int,
        intermediate_size: int,
        shared_intermediate_size: int,
        normalize: bool,
    ):
        self.num_experts, self.top_k, self.normalize = num_experts, top_k, normalize
        self.gate = scope.matrix("gate", num_experts, hidden_size)
        rows = num_experts * intermediate_size
        if "experts.gate_up_proj.weight" in scope:
            self.gate_up = [scope.matrix("experts.gate_up_proj", 2 * rows, hidden_size)]
        else:
            self.gate_up = [
                scope.matrix(f"experts.{name}", rows, hidden_size) for name in ("gate_proj", "up_proj")
            ]
        self.down = scope.matrix("experts.down_proj", num_experts * hidden_size, intermediate_size)
        self.shared = None
        if shared_intermediate_size:
            expert = MLP(scope / "shared_expert", hidden_size, shared_intermediate_size)
            self.shared = ops.SharedExpert(
                expert.gate_up_proj.weights,
                expert.down_proj.weights[0],
                scope.matrix("shared_expert_gate", 1, hidden_size),
            )

    def __call__(self, x: ops.Rows, residual: Tensor, norm: RMSNorm) -> ops.Rows:
        """Adds the block's output to residual, and the norm of that."""
        out = ops.sparse_moe(
            x,
            self.gate,
            self.gate_up,
            self.down,
            top_k=self.top_k,
            normalize=self.normalize,
            shared=self.shared,
        )
        return norm(out, residual)
