"""One layer of a decoder: what mixes the tokens, and what each of them goes through."""

from torch import Tensor

from helexa import ops
from helexa.layers.attention import Attention
from helexa.layers.gated_delta_net import GatedDeltaNet
from helexa.layers.linear import Scope
from helexa.layers.mlp import MLP
from helexa.layers.moe import SparseMoE
from helexa.layers.norm import ALL_ROWS, RMSNorm
from helexa.layers.step import Step
from helexa.models.config import ModelConfig


class DecoderLayer:
    """A token mixer and a feed-forward block, each of which ends with the norm of whatever comes next."""

    def __init__(self, config: ModelConfig, scope: Scope, mixer: Attention | GatedDeltaNet):
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.mixer = mixer
        self.mlp = _feed_forward(config, scope / "mlp")
        self.input_layernorm = RMSNorm.load(
            scope / "input_layernorm", hidden_size, eps, float_rows=_float_rows(mixer)
        )
        self.post_attention_layernorm = RMSNorm.load(
            scope / "post_attention_layernorm",
            hidden_size,
            eps,
            float_rows=_float_rows(self.mlp),
        )

    def __call__(
        self, x: ops.Rows, residual: Tensor, rope: Tensor, step: Step, rows: slice, norm: RMSNorm
    ) -> ops.Rows:
        """norm of the layer's output, of the given rows.

        x: input_layernorm of residual.   residual: [T, hidden_size], the layer's input, of which the given
        rows become its output.   norm: of whatever comes next.
        """
        residual = residual[rows]
        if isinstance(self.mixer, GatedDeltaNet):
            x = self.mixer(x, step, rows, residual, self.post_attention_layernorm)
        else:
            x = self.mixer(x, rope, step, rows, residual, self.post_attention_layernorm)
        return self.mlp(x, residual, norm)


def make_mixer(config: ModelConfig, scope: Scope, layer: int) -> Attention | GatedDeltaNet:
    """Attention or Gated DeltaNet, each counted by itself: their caches and states are lists of their own."""
    full = [config.is_full_attention(index) for index in range(layer + 1)]
    linear = config.linear_attention
    if linear is not None and not full[layer]:
        return GatedDeltaNet(
            scope / "linear_attn",
            full.count(False) - 1,
            hidden_size=config.hidden_size,
            num_key_heads=linear.num_key_heads,
            num_value_heads=linear.num_value_heads,
            key_head_dim=linear.key_head_dim,
            value_head_dim=linear.value_head_dim,
            num_taps=linear.conv_kernel,
            eps=config.rms_norm_eps,
            tiled=linear.heads_tiled,
            fused_gates=linear.gates_fused,
        )
    return make_attention(config, scope, full.count(True) - 1)


def make_attention(config: ModelConfig, scope: Scope, index: int) -> Attention:
    """The attention of a layer whose caches are the index-th."""
    return Attention(
        scope / "self_attn",
        index,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        scale=config.attention_scale,
        rope_interleaved=config.rope_interleaved,
        bias=config.attention_bias,
        qk_norm=config.qk_norm,
        eps=config.rms_norm_eps,
        output_gate=config.attn_output_gate,
    )


def _float_rows(block: Attention | GatedDeltaNet | MLP | SparseMoE) -> int:
    """Up to how many rows the first matmul of a block sees floats."""
    if isinstance(block, SparseMoE):
        return ALL_ROWS  # routers are never quantized
    if isinstance(block, Attention):
        return block.qkv_proj.float_rows
    return block.in_proj.float_rows if isinstance(block, GatedDeltaNet) else block.gate_up_proj.float_rows


def _feed_forward(config: ModelConfig, scope: Scope) -> MLP | SparseMoE:
    if config.moe is None:
        return MLP(scope, config.hidden_size, config.intermediate_size)
    return SparseMoE(
        scope,
        config.hidden_size,
        num_experts=config.moe.num_experts,
        top_k=config.moe.num_experts_per_tok,
        intermediate_size=config.moe.intermediate_size,
        shared_intermediate_size=config.moe.shared_intermediate_size,
        normalize=config.moe.norm_topk_prob,
    )
