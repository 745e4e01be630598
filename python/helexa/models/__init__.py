"""Language models, one file per family; importing a family waits until a file needs it."""

from importlib import import_module
from typing import Protocol

from torch import Tensor

from helexa.layers.linear import TensorSource
from helexa.layers.step import PAGE_TOKENS, Step
from helexa.models.config import ModelConfig, config_from_gguf

__all__ = [
    "MODELS",
    "Model",
    "ModelConfig",
    "build_model",
    "config_from_gguf",
    "kv_cache_shapes",
    "state_shapes",
    "table_names",
]

MODELS = {
    "llama": "helexa.models.decoder:DecoderForCausalLM",
    "qwen2": "helexa.models.decoder:DecoderForCausalLM",
    "qwen3": "helexa.models.decoder:DecoderForCausalLM",
    "qwen3moe": "helexa.models.decoder:DecoderForCausalLM",
    "qwen3next": "helexa.models.decoder:DecoderForCausalLM",
    "qwen35": "helexa.models.decoder:DecoderForCausalLM",
    "qwen35moe": "helexa.models.decoder:DecoderForCausalLM",
}


class Model(Protocol):
    """What every model offers.  It holds weights and no state of any request."""

    config: ModelConfig

    def __call__(self, step: Step) -> Tensor:
        """Logits [R, vocab_size] float32 of step.logits_rows; capturable."""

    def hidden(self, step: Step) -> Tensor:
        """What the logits are made of: hidden states [R, hidden_size] float32 behind the last norm."""


def build_model(config: ModelConfig, source: TensorSource) -> Model:
    """The model of config.model_type with the weights of `source`.

    Raises InvalidFile, which names the tensor, for one that is missing or has another shape than config says.
    """
    module, _, name = MODELS[config.model_type].partition(":")
    model: Model = getattr(import_module(module), name)(config, source)
    return model


def kv_cache_shapes(config: ModelConfig, num_pages: int) -> list[tuple[int, int, int, int]]:
    """The shape of each tensor of Step.k_cache: [num_pages, kv heads, PAGE_TOKENS, head_dim].

    There is one per attention layer, in their order; those of Step.v_cache are the same.
    """
    shape = (num_pages, config.num_key_value_heads, PAGE_TOKENS, config.head_dim)
    return [shape] * config.num_full_attention_layers


def state_shapes(config: ModelConfig, num_slots: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes of each pair of Step.conv_states and Step.states; one pair per recurrent layer."""
    linear = config.linear_attention
    if linear is None:
        return []
    channels = 2 * linear.num_key_heads * linear.key_head_dim + linear.num_value_heads * linear.value_head_dim
    conv = (num_slots, linear.conv_kernel - 1, channels)
    state = (num_slots, linear.num_value_heads, linear.key_head_dim, linear.value_head_dim)
    return [(conv, state)] * (config.num_hidden_layers - config.num_full_attention_layers)


def table_names(config: ModelConfig) -> frozenset[str]:
    """The tensors, by the file's names, of which the model only looks up rows."""
    layers = range(config.num_hidden_layers, config.num_hidden_layers + config.num_mtp_layers)
    names = {f"blk.{layer}.nextn.embed_tokens.weight" for layer in layers}
    return frozenset(names if config.tie_word_embeddings else names | {"token_embd.weight"})
