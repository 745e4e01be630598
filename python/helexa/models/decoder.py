"""The decoder of llama, qwen2 and the whole qwen3 family.

They differ only in what ModelConfig says: the layout of rotary pairs, biases of q, k and v, norms of q and k,
a gate behind attention, experts instead of one feed-forward block, Gated DeltaNet in place of some attention.
Follows `modeling_llama.py`, `modeling_qwen2.py`, `modeling_qwen3.py`, `modeling_qwen3_moe.py`,
`modeling_qwen3_next.py` and `modeling_qwen3_5.py` of transformers.
"""

import torch
from torch import Tensor

from helexa import ops
from helexa.layers.embedding import Embedding
from helexa.layers.linear import Linear, Scope, TensorSource
from helexa.layers.norm import RMSNorm
from helexa.layers.rotary import RotaryEmbedding
from helexa.layers.step import Step
from helexa.models.config import ModelConfig
from helexa.models.decoder_layer import DecoderLayer, make_mixer
from helexa.models.mtp import MTP_NAMES, MTPHead


class Decoder:
    """Token ids to normalised hidden states."""

    def __init__(self, config: ModelConfig, scope: Scope):
        size = config.hidden_size
        self.embed_tokens = Embedding(scope.table("embed_tokens", config.vocab_size, size))
        self.rotary_emb = RotaryEmbedding.load(
            scope, config.rotary_dim, config.rope_theta, config.rope_scaling
        )
        layers = [scope / "layers" / index for index in range(config.num_hidden_layers)]
        self.layers = [
            DecoderLayer(config, layer, make_mixer(config, layer, index))
            for index, layer in enumerate(layers)
        ]
        self.norm = RMSNorm.load(scope / "norm", size, config.rms_norm_eps)

    def __call__(self, step: Step, *, keep_float: bool = False) -> ops.Rows:
        """The rows of step.logits_rows [R, hidden_size]; keep_float: in float32 too."""
        rope = self.rotary_emb(step.positions)
        residual = self.embed_tokens(step.token_ids)
        x = self.layers[0].input_layernorm(residual)
        for layer, following in zip(self.layers[:-1], self.layers[1:], strict=True):
            x = layer(x, residual, rope, step, slice(None), following.input_layernorm)
        # Behind the keys and values of the last layer only the rows matter whose logits are wanted.
        norm = self.norm.with_floats() if keep_float else self.norm
        return self.layers[-1](x, residual, rope, step, step.logits_rows, norm)


class DecoderForCausalLM:
    """model(step) -> logits [R, vocab_size] float32 of step.logits_rows; all rows extend the caches."""

    def __init__(self, config: ModelConfig, source: TensorSource):
        names = GGUF_NAMES | HYBRID_NAMES if config.linear_attention else GGUF_NAMES
        scope = Scope(source, names | MTP_NAMES)
        self.config = config
        self.model = Decoder(config, scope / "model")
        head = scope / "model" if config.tie_word_embeddings else scope
        module = "embed_tokens" if config.tie_word_embeddings else "lm_head"
        self.lm_head = Linear.load(head, config.hidden_size, {module: config.vocab_size})
        self.mtp = None
        if config.num_mtp_layers:
            layer = scope / "model" / "layers" / config.num_hidden_layers
            self.mtp = MTPHead(config, layer, self.model, self.lm_head)

    def __call__(self, step: Step) -> Tensor:
        return self.lm_head(self.model(step, keep_float=self.lm_head.float_rows > 0), torch.float32)

    def hidden(self, step: Step) -> Tensor:
        """Normalised hidden states [R, hidden_size] float32 of step.logits_rows."""
        return ops.as_float(self.model(step, keep_float=True))


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
