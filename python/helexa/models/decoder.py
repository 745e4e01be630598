"""The decoder of llama, qwen2 and the whole qwen3 family.

They differ only in what ModelConfig says: the layout of rotary pairs, biases of q, k and v, norms of q and k,
a gate behind attention, experts instead of one feed-forward block, Gated DeltaNet in place of some attention.
Follows `modeling_llama.py`, `modeling_qwen2.py`, `modeling_qwen3.py`, `modeling_qwen3_moe.py`,
`modeling_qwen3_next.py` and `modeling_qwen3_5.py` of transformers.
"""

from torch import Tensor

from helexa.layers.attention import Attention
from helexa.layers.embedding import Embedding
from helexa.layers.gated_delta_net import GatedDeltaNet
from helexa.layers.linear import Linear, Scope, TensorSource
from helexa.layers.mlp import MLP
from helexa.layers.moe import SparseMoE
from helexa.layers.norm import RMSNorm
from helexa.layers.rotary import RotaryEmbedding
from helexa.layers.step import Step
from helexa.models.config import ModelConfig


class DecoderLayer:
    """A token mixer and a feed-forward block, each after a norm, which first adds what came before."""

    def __init__(self, config: ModelConfig, scope: Scope, layer_index: int):
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm.load(scope / "input_layernorm", hidden_size, eps)
        self.mixer = _mixer(config, scope, layer_index)
        self.post_attention_layernorm = RMSNorm.load(scope / "post_attention_layernorm", hidden_size, eps)
        self.mlp = _feed_forward(config, scope / "mlp")

    def __call__(
        self, hidden: Tensor | None, residual: Tensor, rope: Tensor, step: Step, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """(MLP output, residual) of the given rows; their sum is the layer's output.

        hidden, residual: [T, hidden_size], the same of the layer before; hidden is None for the first layer.
        Changes residual in place.
        """
        hidden = self.input_layernorm(residual) if hidden is None else self.input_layernorm(hidden, residual)
        if isinstance(self.mixer, GatedDeltaNet):
            hidden = self.mixer(hidden, step, rows)  # [R, hidden_size]
        else:
            hidden = self.mixer(hidden, rope, step, rows)
        residual = residual[rows]
        hidden = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


def _mixer(config: ModelConfig, scope: Scope, layer: int) -> Attention | GatedDeltaNet:
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
    return Attention(
        scope / "self_attn",
        full.count(True) - 1,
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


class Decoder:
    """Token ids to normalised hidden states."""

    def __init__(self, config: ModelConfig, scope: Scope):
        size = config.hidden_size
        self.embed_tokens = Embedding(scope.matrix("embed_tokens", config.vocab_size, size))
        self.rotary_emb = RotaryEmbedding.load(
            scope, config.rotary_dim, config.rope_theta, config.rope_scaling
        )
        self.layers = [DecoderLayer(config, scope / "layers" / i, i) for i in range(config.num_hidden_layers)]
        self.norm = RMSNorm.load(scope / "norm", size, config.rms_norm_eps)

    def __call__(self, step: Step) -> Tensor:
        rope = self.rotary_emb(step.positions)
        hidden, residual = None, self.embed_tokens(step.token_ids)
        for layer in self.layers[:-1]:
            hidden, residual = layer(hidden, residual, rope, step, slice(None))
        # Behind the keys and values of the last layer only the rows matter whose logits are wanted.
        hidden, residual = self.layers[-1](hidden, residual, rope, step, step.logits_rows)
        return self.norm(hidden, residual)  # [R, hidden_size]


class DecoderForCausalLM:
    """model(step) -> logits [R, vocab_size] float32 of step.logits_rows; all rows extend the caches."""

    def __init__(self, config: ModelConfig, source: TensorSource):
        names = GGUF_NAMES | HYBRID_NAMES if config.linear_attention else GGUF_NAMES
        scope = Scope(source, names)
        self.config = config
        self.model = Decoder(config, scope / "model")
        if config.tie_word_embeddings:
            self.lm_head = Linear([self.model.embed_tokens.weight])
        else:
            self.lm_head = Linear.load(scope, config.hidden_size, {"lm_head": config.vocab_size})

    def __call__(self, step: Step) -> Tensor:
        return self.lm_head(self.model(step))

    def hidden(self, step: Step) -> Tensor:
        """Normalised hidden states [R, hidden_size] float32 of step.logits_rows."""
        return self.model(step)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.rope_factors": "rope_freqs",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.q_norm": "blk.{}.attn_q_norm",
    "model.layers.{}.self_attn.k_norm": "blk.{}.attn_k_norm",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
    "model.layers.{}.mlp.gate": "blk.{}.ffn_gate_inp",
    "model.layers.{}.mlp.experts.gate_proj": "blk.{}.ffn_gate_exps",
    "model.layers.{}.mlp.experts.up_proj": "blk.{}.ffn_up_exps",
    "model.layers.{}.mlp.experts.gate_up_proj": "blk.{}.ffn_gate_up_exps",
    "model.layers.{}.mlp.experts.down_proj": "blk.{}.ffn_down_exps",
    "model.layers.{}.mlp.shared_expert.gate_proj": "blk.{}.ffn_gate_shexp",
    "model.layers.{}.mlp.shared_expert.up_proj": "blk.{}.ffn_up_shexp",
    "model.layers.{}.mlp.shared_expert.down_proj": "blk.{}.ffn_down_shexp",
    "model.layers.{}.mlp.shared_expert_gate": "blk.{}.ffn_gate_inp_shexp",
    "model.norm": "output_norm",
    "lm_head": "output",
}

HYBRID_NAMES = {
    "model.layers.{}.post_attention_layernorm": "blk.{}.post_attention_norm",
    "model.layers.{}.linear_attn.in_proj_qkv": "blk.{}.attn_qkv",
    "model.layers.{}.linear_attn.in_proj_z": "blk.{}.attn_gate",
    "model.layers.{}.linear_attn.in_proj_b": "blk.{}.ssm_beta",
    "model.layers.{}.linear_attn.in_proj_a": "blk.{}.ssm_alpha",
    "model.layers.{}.linear_attn.in_proj_ba": "blk.{}.ssm_ba",
    "model.layers.{}.linear_attn.conv1d": "blk.{}.ssm_conv1d",
    "model.layers.{}.linear_attn.decay": "blk.{}.ssm_a",
    "model.layers.{}.linear_attn.dt_bias": "blk.{}.ssm_dt.bias",
    "model.layers.{}.linear_attn.norm": "blk.{}.ssm_norm",
    "model.layers.{}.linear_attn.out_proj": "blk.{}.ssm_out",
}
