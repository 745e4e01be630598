"""HuggingFace directories written by hand: safetensors files, and golden models as transformers has them."""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from helexa.quant import FORMATS
from helexa.weights.gguf import open_gguf
from helexa.weights.model_file import open_model

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL_TYPES = {
    "qwen3moe": "qwen3_moe",
    "qwen3next": "qwen3_next",
    "qwen35": "qwen3_5_text",
    "qwen35moe": "qwen3_5_moe_text",
}
HYBRIDS = ("qwen3next", "qwen35", "qwen35moe")
DEFAULTS = {  # of tools/make_golden.py
    "vocab_size": 131,
    "intermediate_size": 90,
    "num_hidden_layers": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
Array = np.ndarray[Any, Any]


def bf16(values: Array) -> Array:
    """Numbers of bf16, as uint16."""
    raw = gguf.quants.quantize(np.asarray(values, np.float32), gguf.GGMLQuantizationType.BF16)
    return np.ascontiguousarray(raw).view("<u2").reshape(values.shape)


STORED: dict[str, Callable[[Array], Array]] = {
    "F32": lambda values: values,
    "F16": lambda values: values.astype(np.float16),
    "BF16": bf16,
}
VALUES: dict[str, Callable[[Array], Array]] = {
    "F32": lambda stored: stored,
    "F16": lambda stored: stored.astype(np.float32),
    "BF16": lambda stored: (stored.astype(np.uint32) << 16).view(np.float32),
}


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, Array]]) -> None:
    """A file of tensors, each with its type as the format spells it."""
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, data) in tensors.items():
        end = start + data.nbytes
        header[name] = {"dtype": dtype, "shape": list(data.shape), "data_offsets": [start, end]}
        start = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    data = b"".join(np.ascontiguousarray(data).tobytes() for _, data in tensors.values())
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


@dataclass(frozen=True)
class Layout:
    """How a directory is written."""

    dtype: str = "F32"
    rounded_to: str = "F32"  # the values, whatever they are stored as
    num_files: int = 1
    prefix: str = "model."  # of the language model
    has_head: bool = True
    fused_experts: bool = False
    nested: bool = False  # config.json has the text model's below text_config


def golden_config(case: str) -> dict[str, Any]:
    """config.json of a golden model, from what its class was made with."""
    made_with = json.loads((GOLDEN / "manifest.json").read_text())["cases"][case]
    architecture, rope = made_with.pop("architecture"), made_with.pop("rope")
    made_with.pop("num_tokens")
    return {
        **DEFAULTS,
        **made_with,
        "model_type": MODEL_TYPES.get(architecture, architecture),
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"} | rope,
    }


def write_golden(case: str, path: Path, layout: Layout = Layout(), **changes: Any) -> Path:
    """The golden model as a directory; `changes` go into its config.json. Returns the directory."""
    config = golden_config(case) | changes
    path.mkdir(exist_ok=True)
    tensors = golden_tensors(case, config, fused_experts=layout.fused_experts)
    named = {
        name if name.startswith("lm_head") else layout.prefix + name.removeprefix("model."): data
        for name, data in tensors.items()
        if layout.has_head or not name.startswith("lm_head")
    }
    write_checkpoint(path, named, layout)
    if layout.nested:
        outer = config["model_type"].removesuffix("_text")
        config = {"model_type": outer, "text_config": config, "vision_config": {"depth": 1}}
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_checkpoint(path: Path, tensors: Mapping[str, Array], layout: Layout = Layout()) -> None:
    """The tensors in one file, or dealt out to several with an index."""
    typed = {}
    for name, data in tensors.items():
        rounded = VALUES[layout.rounded_to](STORED[layout.rounded_to](data))
        typed[name] = layout.dtype, STORED[layout.dtype](rounded)
    if layout.num_files == 1:
        write_safetensors(path / "model.safetensors", typed)
        return
    weight_map = {}
    for number in range(layout.num_files):
        file = f"model-{number + 1:05}-of-{layout.num_files:05}.safetensors"
        part = dict(list(typed.items())[number :: layout.num_files])
        write_safetensors(path / file, part)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_as_gguf(directory: Path, path: Path) -> Path:
    """What a directory of single precision is seen as, written down by the `gguf` package."""
    with open_model(directory) as file:
        writer = gguf.GGUFWriter(path, file.architecture)
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add |= {bool: writer.add_bool, list: writer.add_array}
        for key, value in file.metadata.items():
            if key != "general.architecture":
                add[type(value)](key, value)
        for name, info in file.tensors.items():
            writer.add_tensor(name, np.frombuffer(file.data(name), np.float32).reshape(info.shape))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def golden_tensors(case: str, config: Mapping[str, Any], *, fused_experts: bool) -> dict[str, Array]:
    """The tensors of a golden GGUF file as transformers has them."""
    with open_gguf(GOLDEN / f"{case}.gguf") as file:
        architecture = file.architecture
        found = {
            name: FORMATS[info.format].dequantize(bytes(file.data(name))).reshape(info.shape)
            for name, info in file.tensors.items()
            if name != "rope_freqs.weight"
        }
    tensors: dict[str, Array] = {}
    for name, data in found.items():
        block, _, kind = name.rpartition(".")
        if any(part in name for part in ("_exps", "ssm_", "attn_qkv", "attn_gate")):
            continue
        if architecture in HYBRIDS and "norm" in name:
            data = data - np.float32(1.0)
        if architecture == "llama" and ("attn_q." in name or "attn_k." in name):
            heads = config["num_attention_heads" if "attn_q." in name else "num_key_value_heads"]
            data = data.reshape(heads, -1, 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        tensors[f"{path_of(block)}.{kind}"] = data
    for layer in range(config["num_hidden_layers"]):
        tensors |= experts(found, layer, fused=fused_experts)
        if f"blk.{layer}.ssm_a" in found:
            tensors |= delta_net(found, layer, architecture, config)
    return tensors


def path_of(block: str) -> str:
    """A module's path in transformers, by its name in GGUF files."""
    match block.split("."):
        case ["blk", layer, module]:
            return f"model.layers.{layer}.{MODULES[module]}"
        case _:
            return MODULES[block]


def experts(found: Mapping[str, Array], layer: int, *, fused: bool) -> dict[str, Array]:
    """The experts of a layer, one by one or as two stacks."""
    block, path = f"blk.{layer}", f"model.layers.{layer}.mlp.experts"
    if f"{block}.ffn_down_exps.weight" not in found:
        return {}
    down = found[f"{block}.ffn_down_exps.weight"]
    both = found.get(f"{block}.ffn_gate_up_exps.weight")
    if both is None:
        parts = [found[f"{block}.ffn_{kind}_exps.weight"] for kind in ("gate", "up")]
        both = np.concatenate(parts, axis=1)
    if fused:
        return {f"{path}.gate_up_proj": both, f"{path}.down_proj": down}
    tensors = {}
    for number in range(len(down)):
        gate, up = np.split(both[number], 2)
        for kind, data in (("gate", gate), ("up", up), ("down", down[number])):
            tensors[f"{path}.{number}.{kind}_proj.weight"] = data
    return tensors


def delta_net(
    found: Mapping[str, Array], layer: int, architecture: str, config: Mapping[str, Any]
) -> dict[str, Array]:
    """The parameters of Gated DeltaNet, their value heads grouped by key head."""
    key_heads, value_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    group, width = value_heads // key_heads, config["linear_value_head_dim"]
    key_dim = key_heads * config["linear_key_head_dim"]

    def grouped(values: Array, size: int) -> Array:
        if architecture == "qwen3next":
            return values
        rest = values.shape[1:]
        return values.reshape(group, key_heads, size, *rest).swapaxes(0, 1).reshape(-1, *rest)

    def mixed(values: Array) -> Array:
        return np.concatenate([values[: 2 * key_dim], grouped(values[2 * key_dim :], width)])

    block, path = f"blk.{layer}", f"model.layers.{layer}.linear_attn"
    tensors = {
        "A_log": grouped(np.log(-found[f"{block}.ssm_a"]), 1),
        "dt_bias": grouped(found[f"{block}.ssm_dt.bias"], 1),
        "conv1d.weight": mixed(found[f"{block}.ssm_conv1d.weight"])[:, None],
        "norm.weight": found[f"{block}.ssm_norm.weight"],
        "out_proj.weight": grouped(found[f"{block}.ssm_out.weight"].T, width).T,
    }
    qkv, z = mixed(found[f"{block}.attn_qkv.weight"]), grouped(found[f"{block}.attn_gate.weight"], width)
    if architecture == "qwen3next":
        q, k, v = np.split(qkv, [key_dim, 2 * key_dim])
        parts = [part.reshape(key_heads, -1, part.shape[-1]) for part in (q, k, v, z)]
        tensors["in_proj_qkvz.weight"] = np.concatenate(parts, axis=1).reshape(-1, qkv.shape[-1])
        tensors["in_proj_ba.weight"] = found[f"{block}.ssm_ba.weight"]
    else:
        tensors["in_proj_qkv.weight"], tensors["in_proj_z.weight"] = qkv, z
        tensors["in_proj_b.weight"] = grouped(found[f"{block}.ssm_beta.weight"], 1)
        tensors["in_proj_a.weight"] = grouped(found[f"{block}.ssm_alpha.weight"], 1)
    return {f"{path}.{name}": data for name, data in tensors.items()}
