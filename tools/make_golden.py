"""Writes tests/golden: tiny seeded models, built by transformers, with what they compute in float32.

Each case is a GGUF file with llama.cpp's names and row order, and an .npz with `token_ids` [T], `logits`
[T, vocab_size] and `hidden` [layers, T, hidden_size], the output of each decoder layer before the final norm.
manifest.json says how they were made.  Run as `python tools/make_golden.py`, with transformers installed, and
commit the result on its own.
"""

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

SEED = 20250718
LARGEST_CASE_BYTES = 1_000_000
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "qwen3next": (Qwen3NextConfig, Qwen3NextForCausalLM),
    "qwen35": (Qwen3_5TextConfig, Qwen3_5ForCausalLM),
    "qwen35moe": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM),
}
HYBRIDS = ("qwen3next", "qwen35", "qwen35moe")


@dataclass
class Case:
    """One model; `config` are the arguments of its config class."""

    name: str
    architecture: str
    config: dict[str, Any]
    rope: dict[str, Any] = field(default_factory=dict)
    num_tokens: int = 70


CASES = [
    Case(
        "llama",
        "llama",
        {
            "hidden_size": 48,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_hidden_layers": 3,
        },
    ),
    Case(
        "llama_llama3_rope_tied_biased",
        "llama",
        {
            "hidden_size": 96,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 32,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
        rope={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    Case(
        "llama_linear_rope_two_pages",
        "llama",
        {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16},
        rope={"rope_type": "linear", "factor": 4.0},
        num_tokens=300,
    ),
    Case(
        "qwen2_tied",
        "qwen2",
        {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    Case(
        "qwen2_yarn",
        "qwen2",
        {
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16384,
        },
        rope={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    ),
    Case(
        "qwen3",
        "qwen3",
        {
            "hidden_size": 64,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "num_hidden_layers": 3,
        },
    ),
    Case(
        "qwen3_yarn_tied_two_pages",
        "qwen3",
        {
            "hidden_size": 64,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "max_position_embeddings": 512,
        },
        rope={
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 8.0,
            "beta_slow": 0.5,
            "attention_factor": 1.3,
        },
        num_tokens=300,
    ),
    Case(
        "qwen3moe",
        "qwen3moe",
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
    ),
    Case(
        "qwen3next",
        "qwen3next",
        {
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 16,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 32,
        },
        rope={"partial_rotary_factor": 0.25},
        num_tokens=131,
    ),
    Case(
        "qwen35_tied",
        "qwen35",
        {
            "hidden_size": 64,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 6,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "tie_word_embeddings": True,
        },
        rope={"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
        num_tokens=140,
    ),
    Case(
        "qwen35moe",
        "qwen35moe",
        {
            "hidden_size": 48,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_conv_kernel_dim": 3,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 32,
        },
        rope={"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
    ),
]


def build(case: Case, generator: torch.Generator) -> torch.nn.Module:
    """The model, its weights drawn large enough that every part of it shows in the logits."""
    make_config, make_model = CLASSES[case.architecture]
    config = make_config(
        **{
            "vocab_size": 131,
            "intermediate_size": 90,
            "num_hidden_layers": 2,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "attn_implementation": "eager",
        }
        | case.config,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"} | case.rope,
    )
    model = make_model(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("A_log", "dt_bias")):
                parameter.copy_(0.5 * noise - 1.0)
            elif "norm" in name:  # those of hybrids are stored less one, but for the gated norm
                is_less_one = case.architecture in HYBRIDS and "linear_attn" not in name
                parameter.copy_(0.3 * noise + (0.0 if is_less_one else 1.0))
            elif "conv1d" in name:
                parameter.copy_(0.7 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.3 * noise / parameter.shape[-1] ** 0.5)
    return model


def run(model: torch.nn.Module, token_ids: torch.Tensor) -> dict[str, np.ndarray]:
    """Token ids, the output of every layer, and the logits."""
    hidden: list[torch.Tensor] = []

    def record(module: object, inputs: object, output: Any) -> None:
        hidden.append(
            (output[0] if isinstance(output, tuple) else output).reshape(-1, model.config.hidden_size)
        )

    hooks = [layer.register_forward_hook(record) for layer in model.model.layers]
    with torch.no_grad():
        logits = model(token_ids[None], use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return {
        "token_ids": token_ids.to(torch.int32).numpy(),
        "hidden": torch.stack(hidden).numpy(),
        "logits": logits.numpy(),
    }


def interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k in the order of llama's GGUF files: (0, R/2, 1, R/2 + 1, …) within each head."""
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def as_in_gguf(name: str, data: np.ndarray, case: Case, config: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a GGUF file that hold a parameter, with their names."""
    if case.architecture == "llama" and "q_proj" in name:
        data = interleave(data, config.num_attention_heads)
    if case.architecture == "llama" and "k_proj" in name:
        data = interleave(data, config.num_key_value_heads)
    if case.architecture in HYBRIDS and "norm" in name and "linear_attn" not in name:
        data = data + 1.0
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[case.architecture.upper()], config.num_hidden_layers)
    layer, _, parameter = name.removeprefix("model.layers.").partition(".")
    if parameter == "mlp.experts.gate_up_proj" and case.architecture == "qwen35moe":
        yield f"blk.{layer}.ffn_gate_up_exps.weight", data
    elif parameter == "mlp.experts.gate_up_proj":
        gate, up = np.split(data, 2, axis=1)
        yield f"blk.{layer}.ffn_gate_exps.weight", gate
        yield f"blk.{layer}.ffn_up_exps.weight", up
    elif parameter == "mlp.experts.down_proj":
        yield f"blk.{layer}.ffn_down_exps.weight", data
    elif parameter.startswith("linear_attn."):
        for tensor, part in linear_attention_in_gguf(parameter.split(".")[1], data, case, config):
            yield f"blk.{layer}.{tensor}", part
    else:
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), data


def linear_attention_in_gguf(
    module: str, data: np.ndarray, case: Case, config: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters of Gated DeltaNet: qwen3next's grouped projections taken apart, the others' heads tiled."""
    key_heads = config.linear_num_key_heads
    group = config.linear_num_value_heads // key_heads
    key_dim = key_heads * config.linear_key_head_dim
    width = config.linear_value_head_dim

    def tiled(values: np.ndarray, size: int) -> np.ndarray:
        """The heads, of `size` rows each, ordered by their place within the group and then by key head."""
        if case.architecture == "qwen3next":
            return values
        rest = values.shape[1:]
        return values.reshape(key_heads, group, size, *rest).swapaxes(0, 1).reshape(-1, *rest)

    if module == "in_proj_qkvz":
        per_head = data.reshape(key_heads, -1, data.shape[-1])
        cuts = np.cumsum([config.linear_key_head_dim, config.linear_key_head_dim, group * width])
        q, k, v, z = (part.reshape(-1, data.shape[-1]) for part in np.split(per_head, cuts, axis=1))
        yield "attn_qkv.weight", np.concatenate([q, k, v])
        yield "attn_gate.weight", z
    elif module in ("in_proj_qkv", "conv1d"):
        rows = data.reshape(data.shape[0], -1)
        name = "attn_qkv.weight" if module == "in_proj_qkv" else "ssm_conv1d.weight"
        yield name, np.concatenate([rows[: 2 * key_dim], tiled(rows[2 * key_dim :], width)])
    elif module == "out_proj":
        yield "ssm_out.weight", tiled(data.T, width).T
    else:
        name, size = {
            "in_proj_z": ("attn_gate.weight", width),
            "in_proj_b": ("ssm_beta.weight", 1),
            "in_proj_a": ("ssm_alpha.weight", 1),
            "in_proj_ba": ("ssm_ba.weight", 0),
            "A_log": ("ssm_a", 1),
            "dt_bias": ("ssm_dt.bias", 1),
            "norm": ("ssm_norm.weight", 0),
        }[module]
        data = -np.exp(data) if module == "A_log" else data
        yield name, tiled(data, size) if size else data


def write_gguf(path: Path, case: Case, model: Any) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, case.architecture)
    writer.add_name(case.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    if case.architecture != "qwen35moe":
        writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if "head_dim" in case.config:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(int(config.head_dim * case.rope.get("partial_rotary_factor", 1.0)))
    write_rope(writer, case, model)
    if "num_experts" in case.config:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if "shared_expert_intermediate_size" in case.config:
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if case.architecture in HYBRIDS:
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
        writer.add_full_attention_interval(config.layer_types.index("full_attention") + 1)

    for name, parameter in model.named_parameters():
        for tensor, data in as_in_gguf(name, parameter.detach().numpy(), case, config):
            writer.add_tensor(tensor, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_rope(writer: gguf.GGUFWriter, case: Case, model: Any) -> None:
    """Scaling keys, or for llama 3 the factors by which frequencies are divided."""
    kind = case.rope.get("rope_type")
    if kind == "llama3":
        inv_freq = model.model.rotary_emb.inv_freq
        plain = 10000.0 ** -(torch.arange(inv_freq.numel(), dtype=torch.float32) / inv_freq.numel())
        writer.add_tensor("rope_freqs.weight", (plain / inv_freq).numpy())
    elif kind is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(case.rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(case.rope["original_max_position_embeddings"])
        if "attention_factor" in case.rope:
            writer.add_rope_scaling_yarn_attn_factor(case.rope["attention_factor"])
            writer.add_rope_scaling_yarn_beta_fast(case.rope["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(case.rope["beta_slow"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "tests" / "golden")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for index, case in enumerate(CASES):
        generator = torch.Generator().manual_seed(SEED + index)
        model = build(case, generator)
        token_ids = torch.randint(model.config.vocab_size, (case.num_tokens,), generator=generator)
        results = run(model, token_ids)
        write_gguf(out / f"{case.name}.gguf", case, model)
        np.savez_compressed(out / f"{case.name}.npz", **results)
        nbytes = sum((out / f"{case.name}.{kind}").stat().st_size for kind in ("gguf", "npz"))
        rms = float(np.sqrt(np.mean(results["logits"] ** 2)))
        print(f"{case.name}: {nbytes} bytes, logits of rms {rms:.2f}")
        if nbytes > LARGEST_CASE_BYTES:
            sys.exit(f"{case.name} takes {nbytes} bytes, expected at most {LARGEST_CASE_BYTES}")
    manifest = {
        "command": "python tools/make_golden.py",
        "seed": SEED,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "gguf": version("gguf"),
        },
        "cases": {
            case.name: {"architecture": case.architecture, "rope": case.rope, "num_tokens": case.num_tokens}
            | case.config
            for case in CASES
        },
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
