"""The configuration of a model that is none: stand-ins for models keep what they see in one narrow layer."""

from dataclasses import replace
from typing import Any

from helexa.models import ModelConfig

_TINY = ModelConfig(
    model_type="llama",
    vocab_size=32,
    hidden_size=2,
    intermediate_size=2,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=2,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rotary_dim=2,
    attention_scale=1.0,
)


def tiny_config(vocab_size: int, **others: Any) -> ModelConfig:
    """One layer with one head of two dimensions; `others` are fields that differ."""
    return replace(_TINY, vocab_size=vocab_size, **others)
