"""The dense decoder of llama, qwen2 and qwen3.

They differ only in what ModelConfig says: the layout of rotary pairs, biases of q, k and v, norms of q and k.
Follows `modeling_llama.py`, `modeling_qwen2.py` and `modeling_qwen3.py` of transformers.
"""

from torch import Tensor

from helexa.layers.attention import Attention
from helexa.layers.embedding import Embedding
from helexa.layers.linear import Linear, Scope, TensorSource
from helexa.layers.mlp import MLP
from helexa.layers.norm import RMSNorm
from helexa.layers.rotary import RotaryEmbedding
from helexa.layers.step import Step
from helexa.models.config import ModelConfig


class DecoderLayer:
    """Attention and feed-forward, each after a norm, which first adds what came before to the residual."""

    def __init__(self, config: ModelConfig, scope: Scope, layer_index: int):
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm.load(scope / "input_layernorm", hidden_size, eps)
        self.self_attn = Attention(
            scope / "self_attn",
            layer_index,
            hidden_size=hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            scale=config.attention_scale,
            rope_interleaved=config.rope_interleaved,
            bias=config.attention_bias,
            qk_norm=config.qk_norm,
            eps=eps,
        )
        self.post_attention_layernorm = RMSNorm.load(scope / "post_attention_layernorm", hidden_size, eps)
        self.mlp = MLP(scope / "mlp", hidden_size, config.intermediate_size)

    def __call__(
        self, hidden: Tensor | None, residual: Tensor, rope: Tensor, step: Step, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """(MLP output, residual) of the given rows; their sum is the layer's output.

        hidden, residual: [T, hidden_size], the same of the layer before; hidden is None for the first layer.
        Changes residual in place.
        """
        hidden = self.input_layernorm(residual) if hidden is None else self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden, rope, step, rows)  # [R, hidden_size]
        residual = residual[rows]
        hidden = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


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
        scope = Scope(source, GGUF_NAMES)
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
    "model.norm": "output_norm",
    "lm_head": "output",
}
