"""A checkpoint's config.json as the metadata that a GGUF file of the same model would have.

Where config.json leaves something out, transformers' own default holds. Whatever would change the numbers
and is not implemented is refused by the name that it has there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helexa.errors import InvalidFile, UnsupportedModel

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_5": "qwen35",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe": "qwen35moe",
    "qwen3_5_moe_text": "qwen35moe",
}
HYBRID = ("qwen3next", "qwen35", "qwen35moe")
MOE = ("qwen3moe", "qwen3next", "qwen35moe")
_LARGEST = 1 << 31


@dataclass(frozen=True)
class HFConfig:
    """What config.json says. metadata: GGUF's keys.   frequency_factors: of llama 3's rotation, float32."""

    architecture: str
    metadata: dict[str, Any]
    is_tied: bool | None  # None: it does not say
    fp8_block: tuple[int, int] | None
    frequency_factors: NDArray[np.float32] | None

    def integer(self, key: str) -> int:
        """A value below the architecture's name."""
        return int(self.metadata[f"{self.architecture}.{key}"])


def read_config(config: Mapping[str, Any], *, num_mtp_layers: int = 0) -> HFConfig:
    """What the content of a config.json says. Raises InvalidFile or UnsupportedModel, which name the key."""
    text = config.get("text_config")
    keys = _Keys(config if not isinstance(text, dict) else text)
    model_type = keys.values.get("model_type", config.get("model_type"))
    if not isinstance(model_type, str):
        raise InvalidFile(f"config.json: model_type is {model_type!r}, expected the name of an architecture")
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModel(f"architecture {model_type!r} is not implemented; known: {known}")
    architecture = ARCHITECTURES[model_type]
    _refuse(keys)
    heads, hidden_size = keys.integer("num_attention_heads"), keys.integer("hidden_size")
    default_head_dim = 256 if architecture in HYBRID else 128 if architecture == "qwen3" else 0
    head_dim = keys.integer("head_dim", default_head_dim or max(hidden_size // heads, 1))
    num_layers = keys.integer("num_hidden_layers")
    found: dict[str, Any] = {
        "context_length": keys.integer("max_position_embeddings"),
        "embedding_length": hidden_size,
        "block_count": num_layers + num_mtp_layers,
        "attention.head_count": heads,
        "attention.head_count_kv": keys.integer("num_key_value_heads", heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": keys.number("rms_norm_eps", 1e-6),
        "vocab_size": keys.integer("vocab_size"),
    }
    if num_mtp_layers:
        found["nextn_predict_layers"] = num_mtp_layers
    if architecture != "qwen35moe":
        found["feed_forward_length"] = keys.integer("intermediate_size")
    if architecture in MOE:
        found |= _moe(keys, architecture)
    layer_types = keys.layer_types(num_layers, hybrid=architecture in HYBRID)
    if architecture in HYBRID:
        found |= _linear_attention(keys, layer_types)
    rope, factors = _rope(keys, architecture, head_dim)
    metadata = {"general.architecture": architecture}
    metadata |= {f"{architecture}.{key}": value for key, value in (found | rope).items()}
    return HFConfig(
        architecture,
        metadata,
        is_tied=_is_tied(config, keys.values),
        fp8_block=_fp8_block(config.get("quantization_config") or keys.values.get("quantization_config")),
        frequency_factors=factors,
    )


def sampling_metadata(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """GGUF's `general.sampling.*` from a generation_config.json; nothing if it asks for no sampling."""
    names = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
    if generation_config.get("do_sample") is False:
        names = {}
    names["repetition_penalty"] = "penalty_repeat"
    found = {key: generation_config.get(name) for name, key in names.items()}
    return {f"general.sampling.{key}": value for key, value in found.items() if value is not None}


class _Keys:
    """Typed access to the values of a config.json."""

    def __init__(self, values: Mapping[str, Any], where: str = ""):
        self.values, self._where = values, where

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 1 <= value < _LARGEST:
            raise self.invalid(key, value, "an integer from 1 up")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0.0 < value < math.inf:
            raise self.invalid(key, value, "a number above 0")
        return float(value)

    def layer_types(self, num_layers: int, *, hybrid: bool) -> list[str]:
        """What mixes tokens in each layer."""
        if not hybrid:
            return ["full_attention"] * num_layers
        interval = self.integer("full_attention_interval", 4)
        usual = [
            "linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(num_layers)
        ]
        found = self.get("layer_types", usual)
        known = ("linear_attention", "full_attention")
        if (
            not isinstance(found, list)
            or len(found) != num_layers
            or any(kind not in known for kind in found)
        ):
            raise self.unsupported("layer_types", f"{num_layers} of {' and '.join(known)}")
        return found

    def invalid(self, key: str, found: object, expected: str) -> InvalidFile:
        what = "is missing" if found is None else f"is {found!r:.80}"
        return InvalidFile(f"config.json: {self._where}{key} {what}, expected {expected}")

    def unsupported(self, key: str, expected: str) -> UnsupportedModel:
        found = self.values.get(key)
        return UnsupportedModel(f"config.json: {self._where}{key} is {found!r:.80}, supported is {expected}")


def _refuse(keys: _Keys) -> None:
    """Raises UnsupportedModel for what would silently give other numbers."""
    if keys.get("hidden_act", "silu") not in ("silu", "swish"):
        raise keys.unsupported("hidden_act", "silu")
    if keys.get("decoder_sparse_step", 1) != 1:
        raise keys.unsupported("decoder_sparse_step", "1: experts in every layer")
    if keys.get("mlp_only_layers", []):
        raise keys.unsupported("mlp_only_layers", "experts in every layer")
    window = keys.get("sliding_window")
    slides = keys.get("use_sliding_window", False) and window is not None
    kinds = keys.get("layer_types")
    if slides and isinstance(kinds, list):
        slides = "sliding_attention" in kinds
    elif slides:
        first = keys.get("max_window_layers", 28)
        slides = type(first) is not int or first < keys.integer("num_hidden_layers")
    if slides and keys.integer("sliding_window") < keys.integer("max_position_embeddings"):
        raise keys.unsupported("sliding_window", "a window of at least max_position_embeddings")


def _moe(keys: _Keys, architecture: str) -> dict[str, Any]:
    found = {
        "expert_count": keys.integer("num_experts", keys.get("num_local_experts")),
        "expert_used_count": keys.integer("num_experts_per_tok"),
        "expert_feed_forward_length": keys.integer("moe_intermediate_size"),
        "expert_weights_norm": True,
    }
    if architecture != "qwen35moe":  # which always normalises
        found["expert_weights_norm"] = bool(keys.get("norm_topk_prob", architecture == "qwen3next"))
    if architecture != "qwen3moe":
        shared = keys.integer("shared_expert_intermediate_size", 512)
        found["expert_shared_feed_forward_length"] = shared
    return found


def _linear_attention(keys: _Keys, layer_types: list[str]) -> dict[str, Any]:
    value_heads = keys.integer("linear_num_value_heads", 32)
    found: dict[str, Any] = {
        "ssm.conv_kernel": keys.integer("linear_conv_kernel_dim", 4),
        "ssm.state_size": keys.integer("linear_key_head_dim", 128),
        "ssm.group_count": keys.integer("linear_num_key_heads", 16),
        "ssm.time_step_rank": value_heads,
        "ssm.inner_size": keys.integer("linear_value_head_dim", 128) * value_heads,
    }
    recurrent = [kind == "linear_attention" for kind in layer_types]
    interval = recurrent.index(False) + 1 if False in recurrent else len(recurrent) + 1
    if recurrent == [bool((layer + 1) % interval) for layer in range(len(recurrent))]:
        found["full_attention_interval"] = interval
    else:
        found["attention.recurrent_layers"] = recurrent
    return found


def _rope(keys: _Keys, architecture: str, head_dim: int) -> tuple[dict[str, Any], NDArray[np.float32] | None]:
    """Keys of the rotation, and llama 3's factors if it has them."""
    given = keys.get("rope_scaling") or keys.get("rope_parameters") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise InvalidFile(f"config.json: rope_parameters is {given!r:.80}, expected one set of parameters")
    rope = _Keys(given, "rope_parameters.")
    share = rope.get("partial_rotary_factor", keys.get("partial_rotary_factor"))
    if architecture in HYBRID:
        share = 0.25 if share is None else share
    elif share not in (None, 1, 1.0):
        raise rope.unsupported("partial_rotary_factor", "1: whole heads are rotated")
    if share is not None and (type(share) not in (int, float) or not 0 < share <= 1):
        raise rope.invalid("partial_rotary_factor", share, "a number up to 1")
    rotary_dim = int(head_dim * (1 if share is None else share))
    theta = rope.number("rope_theta", keys.number("rope_theta", 10_000.0))
    found: dict[str, Any] = {"rope.freq_base": theta, "rope.dimension_count": rotary_dim}
    if architecture in ("qwen35", "qwen35moe"):
        sections = rope.get("mrope_section", [11, 11, 10])
        if not isinstance(sections, list) or any(type(size) is not int for size in sections):
            raise rope.invalid("mrope_section", sections, "a list of sizes")
        found["rope.dimension_sections"] = [*sections, 0][:4]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "linear":
        return found | {"rope.scaling.type": "linear", "rope.scaling.factor": rope.number("factor")}, None
    if kind == "yarn":
        return found | _yarn(rope, keys), None
    if kind == "llama3":
        return found, _llama3_factors(rope, keys, rotary_dim, theta)
    if kind not in ("default", "mrope"):
        raise UnsupportedModel(
            f"config.json: rope_type is {kind!r}, supported is default, linear, yarn or llama3"
        )
    return found, None


def _original_context(rope: _Keys, keys: _Keys) -> int:
    own = keys.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    if own is None:
        return keys.integer("max_position_embeddings")
    where = keys if "original_max_position_embeddings" in keys.values else rope
    return where.integer("original_max_position_embeddings")


def _yarn(rope: _Keys, keys: _Keys) -> dict[str, Any]:
    if rope.get("truncate", True) is not True:
        raise rope.unsupported("truncate", "true")
    original = _original_context(rope, keys)
    factor = rope.number("factor", keys.integer("max_position_embeddings") / original)
    found: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
        "rope.scaling.yarn_beta_fast": rope.number("beta_fast", 32.0) if rope.get("beta_fast") else 32.0,
        "rope.scaling.yarn_beta_slow": rope.number("beta_slow", 1.0) if rope.get("beta_slow") else 1.0,
    }
    if rope.get("attention_factor") is not None:
        found["rope.scaling.yarn_attn_factor"] = rope.number("attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        scales = [0.1 * rope.number(key) * math.log(factor) + 1.0 for key in ("mscale", "mscale_all_dim")]
        found["rope.scaling.yarn_attn_factor"] = scales[0] / scales[1] if factor > 1 else 1.0
    return found


def _llama3_factors(rope: _Keys, keys: _Keys, rotary_dim: int, theta: float) -> NDArray[np.float32]:
    """By what each frequency is divided: high ones by 1, low ones by `factor`, those between by a blend."""
    factor, original = rope.number("factor"), _original_context(rope, keys)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise rope.invalid("low_freq_factor", low, f"a number below the {high:g} of high_freq_factor")
    frequencies = 1.0 / theta ** (np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    turns = original * frequencies / (2 * math.pi)  # within the original context
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - blend) / factor + blend)).astype(np.float32)


def _is_tied(config: Mapping[str, Any], text: Mapping[str, Any]) -> bool | None:
    flags = [flag for values in (config, text) if (flag := values.get("tie_word_embeddings")) is not None]
    return any(flags) if flags else None


def _fp8_block(quantization: Any) -> tuple[int, int] | None:
    """Rows and columns that share a scale; UnsupportedModel for any other quantization."""
    if not quantization:
        return None
    keys = _Keys(quantization if isinstance(quantization, dict) else {}, "quantization_config.")
    if keys.get("quant_method") != "fp8":
        raise keys.unsupported("quant_method", "fp8, or no quantization")
    block = keys.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or any(type(n) is not int or n < 1 for n in block):
        raise keys.unsupported("weight_block_size", "two sizes, as [128, 128]")
    return block[0], block[1]
