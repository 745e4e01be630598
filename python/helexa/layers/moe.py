"""Sparse mixture of experts, with a shared expert where the model has one."""

from torch import Tensor

from helexa import ops
from helexa.layers.linear import Linear, Scope
from helexa.layers.mlp import MLP


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
        self.gate = Linear.load(scope, hidden_size, {"gate": num_experts})
        rows = num_experts * intermediate_size
        if "experts.gate_up_proj.weight" in scope:
            self.gate_up = [scope.matrix("experts.gate_up_proj", 2 * rows, hidden_size)]
        else:
            self.gate_up = [
                scope.matrix(f"experts.{name}", rows, hidden_size) for name in ("gate_proj", "up_proj")
            ]
        self.down = scope.matrix("experts.down_proj", num_experts * hidden_size, intermediate_size)
        self.shared_expert = self.shared_expert_gate = None
        if shared_intermediate_size:
            self.shared_expert = MLP(scope / "shared_expert", hidden_size, shared_intermediate_size)
            self.shared_expert_gate = Linear.load(scope, hidden_size, {"shared_expert_gate": 1})

    def __call__(self, x: Tensor) -> Tensor:
        ids, weights = ops.moe_route(self.gate(x), self.top_k, normalize=self.normalize)
        shared = shared_gate = None
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            shared, shared_gate = self.shared_expert(x), self.shared_expert_gate(x)
        return ops.moe_mlp(
            x,
            ids,
            weights,
            self.gate_up,
            self.down,
            num_experts=self.num_experts,
            shared=shared,
            shared_gate=shared_gate,
        )
