"""One layer of a decoder: what mixes the tokens, and what each of them goes through."""

from torch import Tensor

from helexa import ops
from helexa.layers.attention import Attention
from helexa.layers.gated_delta_net import GatedDeltaNet
from helexa.layers.linear import Scope
from helexa.layers.mlp import MLP
from helexa.layers.moe import SparseMoE
from helexa.layers.norm import RMSNorm
from helexa.layers.step import Step
from helexa.models.config import ModelConfig


class DecoderLayer:
    """A token mixer and a feed-forward block, each after a norm, which first adds what came before."""

    def __init__(self, config: ModelConfig, scope: Scope, mixer: Attention | GatedDeltaNet):
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm.load(scope / "input_layernorm", hidden_size, eps)
        self.mixer = mixer
        self.post_attention_layernorm = RMSNorm.load(scope / "post_attention_layernorm", hidden_size, eps)
        self.mlp = _feed_forward(config, scope / "mlp")
        self._mixer_sees_floats = _sees_floats(self.mixer)
        self._mlp_sees_floats = _sees_floats(self.mlp)

    def __call__(
        self, hidden: Tensor | None, residual: Tensor, rope: Tensor, step: Step, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """(MLP output, residual) of the given rows; their sum is the layer's output.

        hidden, residual: [T, hidden_size], the same of the layer before; hidden is None for the first layer.
        Changes residual in place.
        """
        x, before = (residual, None) if hidden is None else (hidden, residual)
        are_few = len(residual) <= ops.MAX_MATVEC_ROWS  # many rows are multiplied in bfloat16 anyway
        normed = self.input_layernorm(x, before, keep_float=self._mixer_sees_floats and are_few)
        if isinstance(self.mixer, GatedDeltaNet):
            mixed = self.mixer(normed, step, rows)  # [R, hidden_size]
        else:
            mixed = self.mixer(normed, rope, step, rows)
        residual = residual[rows]
        normed = self.post_attention_layernorm(mixed, residual, keep_float=self._mlp_sees_floats)
        return self.mlp(normed), residual


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


def _sees_floats(block: Attention | GatedDeltaNet | MLP | SparseMoE) -> bool:
    """Whether the first matmul of a block has weights that are not quantized."""
    if isinstance(block, Attention):
        return block.qkv_proj.sees_floats
    if isinstance(block, GatedDeltaNet):
        return block.in_proj.sees_floats
    return isinstance(block, SparseMoE) or block.gate_up_proj.sees_floats  # routers are never quantized


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
