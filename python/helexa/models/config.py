"""What defines a model besides its weights, named as in HuggingFace's config.json, read from GGUF metadata.

Whatever would change the numbers and is not implemented is refused here, by name, before any weight is read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from helexa.errors import InvalidFile, UnsupportedModel
from helexa.layers.rotary import RopeScaling

# What tells the architectures apart besides their keys.  Files of llama hold the rows of q and k in the
# order of interleaved pairs.
ARCHITECTURES: dict[str, dict[str, bool]] = {
    "llama": {"rope_interleaved": True},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "qwen3moe": {"qk_norm": True},
    "qwen3next": {"qk_norm": True, "attn_output_gate": True, "linear_gates_fused": True},
    "qwen35": {"qk_norm": True, "attn_output_gate": True, "linear_heads_tiled": True},
    "qwen35moe": {"qk_norm": True, "attn_output_gate": True, "linear_heads_tiled": True},
}
MOE = ("qwen3moe", "qwen3next", "qwen35moe")
HYBRID = ("qwen3next", "qwen35", "qwen35moe")

# Keys below the architecture's name that change the computation in ways these models do not have.  They may
# be present and off.
REFUSED_KEYS = (
    "expert_group_count",
    "expert_weights_scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.temperature_scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "rope.scaling.yarn_log_multiplier",
)
LARGEST = 1 << 20  # of any size but the context's; keeps a damaged file from asking for absurd amounts
LARGEST_HEAD = 512  # of the kernels


class HasShape(Protocol):
    """What is needed of a tensor's header: weights.gguf.TensorInfo."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class MoEConfig:
    """Layers whose feed-forward block is a mixture of experts."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int  # of one expert
    shared_intermediate_size: int  # 0: no shared expert
    norm_topk_prob: bool = True


@dataclass(frozen=True)
class LinearAttentionConfig:
    """Layers of Gated DeltaNet."""

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int
    heads_tiled: bool  # value head h reads key head h % num_key_heads, else h // (value heads per key head)
    gates_fused: bool  # one matrix of b and a, grouped by key head


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only language model; all values are checked and final."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # 0 if every layer has experts instead
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int  # the first dimensions of each head, which are rotated
    attention_scale: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    rope_interleaved: bool = (
        False  # pairs (0, 1), (2, 3), … rotate together instead of (0, R/2), (1, R/2 + 1), …
    )
    attention_bias: bool = False  # q, k and v must have biases; others are used where the file has them
    qk_norm: bool = False  # q and k are normalised per head before they are rotated
    attn_output_gate: bool = False  # q_proj holds for each head q and then a gate for attention's output
    moe: MoEConfig | None = None
    linear_attention: LinearAttentionConfig | None = None
    # Where attention is full; the other layers are linear_attention.  Empty: everywhere.
    full_attention_layers: tuple[int, ...] = ()
    # Layers behind the others that predict a token further; they are no part of the model proper.
    num_mtp_layers: int = 0

    def is_full_attention(self, layer: int) -> bool:
        return self.linear_attention is None or layer in self.full_attention_layers

    @property
    def num_full_attention_layers(self) -> int:
        return sum(map(self.is_full_attention, range(self.num_hidden_layers)))


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HasShape]) -> ModelConfig:
    """The configuration of a GGUF file.

    Raises InvalidFile, which names the key, what was found and what was expected, or UnsupportedModel for a
    sound file of an architecture, or with a feature, that is not implemented.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise InvalidFile(f"general.architecture is {architecture!r}, expected the name of an architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModel(f"architecture {architecture!r} is not implemented; known: {known}")
    keys = _Keys(metadata, architecture)
    context = keys.integer("context_length", most=1 << 31)
    _refuse(keys, context)

    hidden_size = keys.integer("embedding_length")
    num_heads = keys.integer("attention.head_count")
    num_kv_heads = keys.integer("attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        raise keys.invalid(
            "attention.head_count_kv", num_kv_heads, f"a divisor of the {num_heads} attention heads"
        )
    if "attention.key_length" not in keys and hidden_size % num_heads:
        raise keys.invalid("attention.head_count", num_heads, f"a divisor of embedding_length {hidden_size}")
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads, most=LARGEST_HEAD)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise keys.unsupported("attention.value_length", f"the {head_dim} of attention.key_length")
    rotary_dim = keys.integer("rope.dimension_count", head_dim)
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise keys.invalid(
            "rope.dimension_count", rotary_dim, f"an even number up to the {head_dim} of a head"
        )

    flags = dict(ARCHITECTURES[architecture])
    num_mtp_layers = keys.count("nextn_predict_layers")
    num_layers = keys.integer("block_count") - num_mtp_layers
    if num_layers < 1:
        raise keys.invalid("nextn_predict_layers", num_mtp_layers, "fewer than block_count")
    moe = _moe(keys) if architecture in MOE else None
    linear = None
    full_layers: tuple[int, ...] = ()
    if architecture in HYBRID:
        linear = _linear_attention(
            keys,
            tiled=flags.pop("linear_heads_tiled", False),
            fused=flags.pop("linear_gates_fused", False) and "blk.0.ssm_beta.weight" not in tensors,
        )
        full_layers = _full_attention_layers(keys, num_layers)
    return ModelConfig(
        model_type=architecture,
        vocab_size=_vocab_size(keys, tensors),
        hidden_size=hidden_size,
        intermediate_size=(keys.count if moe else keys.integer)("feed_forward_length"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope_theta=keys.number("rope.freq_base", 10000.0, above=1.0),
        rotary_dim=rotary_dim,
        attention_scale=keys.number("attention.scale", 0.0) or head_dim**-0.5,
        rope_scaling=_rope_scaling(keys, context),
        tie_word_embeddings="output.weight" not in tensors,
        moe=moe,
        linear_attention=linear,
        full_attention_layers=full_layers,
        num_mtp_layers=num_mtp_layers,
        **flags,
    )


def _moe(keys: "_Keys") -> MoEConfig:
    num_experts = keys.integer("expert_count")
    top_k = keys.integer("expert_used_count")
    if top_k > num_experts:
        raise keys.invalid("expert_used_count", top_k, f"a number up to the {num_experts} experts")
    return MoEConfig(
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        intermediate_size=keys.integer("expert_feed_forward_length"),
        shared_intermediate_size=keys.count("expert_shared_feed_forward_length"),
        norm_topk_prob=bool(keys.get("expert_weights_norm", True)),
    )


def _linear_attention(keys: "_Keys", *, tiled: bool, fused: bool) -> LinearAttentionConfig:
    key_heads, value_heads = keys.integer("ssm.group_count"), keys.integer("ssm.time_step_rank")
    inner = keys.integer("ssm.inner_size")
    if value_heads % key_heads:
        raise keys.invalid("ssm.time_step_rank", value_heads, f"a multiple of the {key_heads} key heads")
    if inner % value_heads:
        raise keys.invalid("ssm.inner_size", inner, f"a multiple of the {value_heads} value heads")
    return LinearAttentionConfig(
        num_key_heads=key_heads,
        num_value_heads=value_heads,
        key_head_dim=keys.integer("ssm.state_size"),
        value_head_dim=inner // value_heads,
        conv_kernel=keys.integer("ssm.conv_kernel", most=64),
        heads_tiled=tiled,
        gates_fused=fused,
    )


def _full_attention_layers(keys: "_Keys", num_layers: int) -> tuple[int, ...]:
    """Of a list of recurrent layers, the others; else every full_attention_interval-th."""
    recurrent = keys.metadata.get(f"{keys.architecture}.attention.recurrent_layers")
    if recurrent is not None and len(recurrent) >= num_layers:
        return tuple(layer for layer in range(num_layers) if not recurrent[layer])
    interval = keys.integer("full_attention_interval", 4)
    return tuple(range(interval - 1, num_layers, interval))


class _Keys:
    """Typed access to the metadata below one architecture's name."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str):
        self.metadata = metadata
        self.architecture = architecture

    def __contains__(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands; a list with one entry per layer becomes its value if all are the same."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, str | bytes) or not hasattr(value, "__len__"):
            return value
        entries = list(value)
        if not entries or any(entry != entries[0] for entry in entries):
            raise self.unsupported(key, "the same value for all layers")
        return entries[0]

    def integer(self, key: str, default: int | None = None, *, most: int = LARGEST) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not hasattr(value, "__index__") or not 1 <= value <= most:
            raise self.invalid(key, value, f"an integer from 1 to {most}")
        return int(value)

    def count(self, key: str) -> int:
        """An integer from 0 up; 0 if it is missing."""
        return self.integer(key) if self.get(key) else 0

    def number(self, key: str, default: float | None = None, *, above: float | None = None) -> float:
        """A finite number from 0 up, or greater than `above`."""
        value = self.get(key, default)
        if isinstance(value, bool) or not hasattr(value, "__float__") or not 0.0 <= float(value) < math.inf:
            raise self.invalid(key, value, "a number from 0 up")
        if above is not None and float(value) <= above:
            raise self.invalid(key, value, f"a number above {above:g}")
        return float(value)

    def invalid(self, key: str, found: object, expected: str) -> InvalidFile:
        what = "is missing" if found is None else f"is {found!r}"
        return InvalidFile(f"{self.architecture}.{key} {what}, expected {expected}")

    def unsupported(self, key: str, expected: str) -> UnsupportedModel:
        found = self.metadata.get(f"{self.architecture}.{key}")
        return UnsupportedModel(f"{self.architecture}.{key} is {found!r}, supported is {expected}")


def _refuse(keys: _Keys, context: int) -> None:
    """Raises UnsupportedModel for features that would silently give other numbers."""
    refused = REFUSED_KEYS if keys.architecture in MOE else ("expert_count", *REFUSED_KEYS)
    for key in refused:
        if keys.get(key):
            raise keys.unsupported(key, "a model without it")
    if keys.get("attention.causal", True) is False:
        raise keys.unsupported("attention.causal", "causal attention")
    # A window that the context never outgrows is no window.
    if 0 < keys.number("attention.sliding_window", 0.0) < context:
        raise keys.unsupported(
            "attention.sliding_window", f"a window of at least the context of {context} tokens"
        )


def _vocab_size(keys: _Keys, tensors: Mapping[str, HasShape]) -> int:
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        found = "missing" if embedding is None else f"of shape {list(embedding.shape)}"
        raise InvalidFile(
            f"tensor 'token_embd.weight' is {found}, expected a matrix [vocab_size, embedding_length]"
        )
    rows = embedding.shape[0]
    if keys.integer("vocab_size", rows, most=1 << 31) != rows:
        raise keys.invalid("vocab_size", keys.get("vocab_size"), f"the {rows} rows of token_embd.weight")
    return rows


def _rope_scaling(keys: _Keys, context: int) -> RopeScaling | None:
    """What `rope.scaling.*` says; a factor without a type is linear, as in files from before the type."""
    legacy_factor = keys.number("rope.scale_linear", 1.0)
    factor = keys.number("rope.scaling.factor", legacy_factor) or 1.0
    rope_type = keys.get("rope.scaling.type", "linear")
    if rope_type not in ("none", "linear", "yarn"):
        raise keys.unsupported("rope.scaling.type", "none, linear or yarn")
    if rope_type == "none" or (rope_type == "linear" and factor == 1.0):
        return None
    attention_factor = keys.number("rope.scaling.attn_factor", 1.0)
    if rope_type == "linear":
        return RopeScaling("linear", factor, attention_factor)
    if factor < 1.0:
        raise keys.invalid("rope.scaling.factor", factor, "a number from 1 up")
    extrapolation_factor = keys.number("rope.scaling.yarn_ext_factor", 1.0)
    # Converters write config.json's attention_factor here, which stands for the whole of yarn's own factor.
    yarn_factor = 0.1 * math.log(factor) + 1.0 if extrapolation_factor else 1.0
    return RopeScaling(
        "yarn",
        factor,
        attention_factor * keys.number("rope.scaling.yarn_attn_factor", yarn_factor),
        keys.integer("rope.scaling.original_context_length", context, most=1 << 31),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0, above=0.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0, above=0.0),
        extrapolation_factor=extrapolation_factor,
    )
