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
    Qwen3Config,
    Qwen3ForCausalLM,
)

SEED = 20250718
LARGEST_CASE_BYTES = 1_000_000
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


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
            if "norm" in name:
                parameter.copy_(1.0 + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.3 * noise / parameter.shape[1] ** 0.5)
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


def write_gguf(path: Path, case: Case, model: Any) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, case.architecture)
    writer.add_name(case.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if "head_dim" in case.config:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
    write_rope(writer, case, model)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[case.architecture.upper()], config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        data = parameter.detach().numpy()
        if case.architecture == "llama" and "q_proj" in name:
            data = interleave(data, config.num_attention_heads)
        if case.architecture == "llama" and "k_proj" in name:
            data = interleave(data, config.num_key_value_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(data))
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
