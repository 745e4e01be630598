"""Gated DeltaNet: linear attention with a recurrent state instead of keys and values."""

from torch import Tensor

from helexa import ops
from helexa.layers.linear import Linear, Scope
from helexa.layers.norm import RMSNorm
from helexa.layers.step import Step


class GatedDeltaNet:
    """out_proj(delta rule over in_proj(x)); the state of each sequence lies in its slot.

    Files have `decay` = -exp(A_log).  With `fused_gates` b and a are one matrix, grouped by key head.
    """

    def __init__(
        self,
        scope: Scope,
        layer_index: int,
        *,
        hidden_size: int,
        num_key_heads: int,
        num_value_heads: int,
        key_head_dim: int,
        value_head_dim: int,
        num_taps: int,
        eps: float,
        tiled: bool,
        fused_gates: bool,
    ):
        self.layer_index = layer_index
        key_dim, value_dim = num_key_heads * key_head_dim, num_value_heads * value_head_dim
        conv_dim = 2 * key_dim + value_dim
        weights = [
            scope.matrix("in_proj_qkv", conv_dim, hidden_size),
            scope.matrix("in_proj_z", value_dim, hidden_size),
        ]
        if fused_gates:
            for blocks in _gate_blocks(num_key_heads, num_value_heads // num_key_heads):
                weights.append(scope.matrix("in_proj_ba", num_value_heads, hidden_size, blocks))
        else:
            weights += [
                scope.matrix(name, num_value_heads, hidden_size) for name in ("in_proj_b", "in_proj_a")
            ]
        self.in_proj = Linear(weights)
        self.parameters = ops.DeltaParameters(
            conv_weight=scope.vector("conv1d.weight", conv_dim, num_taps).T.contiguous(),
            decay=scope.vector("decay", num_value_heads),
            dt_bias=scope.vector("dt_bias", num_value_heads),
            norm_weight=scope.vector("norm.weight", value_head_dim),
            num_key_heads=num_key_heads,
            key_head_dim=key_head_dim,
            eps=eps,
            tiled=tiled,
        )
        self.out_proj = Linear.load(scope, value_dim, {"out_proj": hidden_size})

    def __call__(self, x: ops.Rows, step: Step, rows: slice, residual: Tensor, norm: RMSNorm) -> ops.Rows:
        """Adds the output of the given rows of x [T, hidden_size] to residual, and the norm of that.

        residual: [R, hidden_size], of these rows; the states take in all T rows.
        """
        assert step.state_slots is not None
        out = ops.gated_delta_net(
            self.in_proj(x),
            self.parameters,
            step.conv_states[self.layer_index],
            step.states[self.layer_index],
            step.state_slots,
            step.query_start,
            step.kv_lengths,
            settled=True,  # the first norm or the mixer of the layer before came after all that wrote them
        )  # [T, value_dim]
        return norm.after(self.out_proj, out[rows], residual)


def _gate_blocks(num_key_heads: int, group: int) -> tuple[ops.RowBlocks, ops.RowBlocks]:
    """The rows of b and those of a in a matrix that has for each key head b and a of its value heads."""
    starts = [2 * group * head for head in range(num_key_heads)]
    return (
        tuple((start, start + group) for start in starts),
        tuple((start + group, start + 2 * group) for start in starts),
    )
