"""The head of multi-token prediction: from what a model computed of a token, and the token after it, the one
after that.

It is a decoder layer with full attention and a cache of its own behind a projection of both; embedding and
head are the model's. Chained, it reads its own output. Follows the tensors `mtp.*` of Qwen3-Next and
Qwen3.5, whose norms are stored less one, and `nextn.*` of GGUF files, which have it added.
"""

from typing import Protocol

import torch
from torch import Tensor

from helexa import ops
from helexa.layers.embedding import Embedding
from helexa.layers.linear import Linear, Scope
from helexa.layers.norm import RMSNorm
from helexa.layers.rotary import RotaryEmbedding
from helexa.layers.step import Step
from helexa.models.config import ModelConfig
from helexa.models.decoder_layer import DecoderLayer, make_attention


class Shared(Protocol):
    """What a head takes from its model."""

    embed_tokens: Embedding
    rotary_emb: RotaryEmbedding
    norm: RMSNorm


class MTPHead:
    """One layer that predicts the token after the next."""

    def __init__(self, config: ModelConfig, scope: Scope, model: Shared, lm_head: Linear):
        """scope: of the head's layer. Embedding, last norm and head are the model's where it has none."""
        size, eps, own = config.hidden_size, config.rms_norm_eps, scope / "mtp"
        self.embed_tokens, self.rotary_emb = model.embed_tokens, model.rotary_emb
        if "embed_tokens.weight" in own:
            self.embed_tokens = Embedding(own.table("embed_tokens", config.vocab_size, size))
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = (
            RMSNorm.load(own / name, size, eps).with_floats()
            for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden")
        )
        self.fc = Linear.load(own, 2 * size, {"fc": size})
        self.layer = DecoderLayer(config, scope, make_attention(config, scope, 0))
        norm = RMSNorm.load(own / "norm", size, eps) if "norm.weight" in own else model.norm
        self.norm = norm.with_floats()
        self.lm_head = lm_head
        if "lm_head.weight" in own:
            self.lm_head = Linear.load(own, size, {"lm_head": config.vocab_size})

    def __call__(self, step: Step, hidden: Tensor) -> Tensor:
        """Normalised hidden states [R, hidden_size] of step.logits_rows, for `lm_head` or the next round.

        hidden: [T, hidden_size], the model's own behind its last norm.   step: row t has the token after the
        one that hidden[t] was computed of, and the position of hidden[t]; its caches have this layer alone.
        """
        embedded = self.pre_fc_norm_embedding(self.embed_tokens(step.token_ids))
        before = self.pre_fc_norm_hidden(hidden)
        both = torch.cat([ops.as_float(embedded), ops.as_float(before)], dim=1)
        residual = self.fc(both, torch.float32)  # [T, hidden_size]
        x = self.layer.input_layernorm(residual)
        rope = self.rotary_emb(step.positions)
        return ops.as_float(self.layer(x, residual, rope, step, step.logits_rows, self.norm))


MTP_NAMES = {
    "model.layers.{}.mtp.embed_tokens": "blk.{}.nextn.embed_tokens",
    "model.layers.{}.mtp.pre_fc_norm_embedding": "blk.{}.nextn.enorm",
    "model.layers.{}.mtp.pre_fc_norm_hidden": "blk.{}.nextn.hnorm",
    "model.layers.{}.mtp.fc": "blk.{}.nextn.eh_proj",
    "model.layers.{}.mtp.norm": "blk.{}.nextn.shared_head_norm",
    "model.layers.{}.mtp.lm_head": "blk.{}.nextn.shared_head_head",
}
