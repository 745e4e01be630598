"""What the steps of a model need of a device's memory beside weights, states and cache.

An estimate from the sizes of the model that is not too low: whatever has a row for each token of a step.
"""

from dataclasses import replace

from helexa import ops
from helexa.engine.flight import bucket_of
from helexa.engine.options import EngineOptions
from helexa.engine.prompt_steps import MOST_TOKENS, size_of
from helexa.models import ModelConfig

GRAPH_BYTES = 48 << 20  # of captured steps and of modules that are loaded when they are first used
LIBRARY_BYTES = 64 << 20  # of cuBLAS
_FLOAT, _HALF = 4, 2
_MASK_BYTES = 8  # per token of the vocabulary and slot: counts, masks, what the choice of tokens needs


def workspace_nbytes(config: ModelConfig, options: EngineOptions) -> int:
    """Bytes that steps need at their peak, and what sampling keeps."""
    rows = bucket_of(options.max_sequences)
    sampling = (rows * 2 * _FLOAT + (options.max_sequences + 1) * _MASK_BYTES) * config.vocab_size
    # Steps that are captured have memory of their own.
    short = replace(options, prefill_chunk=size_of(min(MOST_TOKENS, options.prefill_tokens)))
    activations = activation_nbytes(config, options) + activation_nbytes(config, short)
    return activations + sampling + 2 * ops.MAX_SPLIT_BYTES + ops.SCRATCH_BYTES + GRAPH_BYTES + LIBRARY_BYTES


def activation_nbytes(config: ModelConfig, options: EngineOptions) -> int:
    """Bytes that a step of as many tokens as there may be takes for what layers hand to each other."""
    tokens = min(options.prefill_tokens, config.max_position_embeddings)
    mixer = max(_attention_width(config), _linear_attention_width(config))
    widest = max(mixer, _feed_forward_width(config))
    # The residual and one form of the input stay while a block's input, output and what is between are there.
    return tokens * (config.hidden_size * (2 * _FLOAT + 2 * _HALF) + widest)


def _attention_width(config: ModelConfig) -> int:
    """Bytes for each token: q, k, v and a gate from one matmul, q again, the output."""
    heads = config.num_attention_heads * (2 if config.attn_output_gate else 1)
    projected = (heads + 2 * config.num_key_value_heads) * config.head_dim
    query = config.num_attention_heads * config.head_dim
    return projected * _HALF + query * (_FLOAT + 2 * _HALF)


def _linear_attention_width(config: ModelConfig) -> int:
    """Bytes for each token: the projections, what the convolution makes of them, chunks in float32."""
    linear = config.linear_attention
    if linear is None:
        return 0
    key = linear.num_key_heads * linear.key_head_dim
    value = linear.num_value_heads * linear.value_head_dim
    return (2 * key + 2 * value) * _HALF + (2 * key + 3 * value) * _FLOAT + value * _HALF


def _feed_forward_width(config: ModelConfig) -> int:
    """Bytes for each token: gate and up, their product, of every expert that a token goes to."""
    if config.moe is None:
        return config.intermediate_size * 3 * _HALF
    chosen = config.moe.num_experts_per_tok * config.moe.intermediate_size
    every = chosen + config.moe.shared_intermediate_size
    outputs = (config.moe.num_experts_per_tok + 1) * config.hidden_size * _FLOAT
    return every * 3 * _FLOAT + outputs + config.hidden_size * _FLOAT
