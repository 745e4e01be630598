"""The head of multi-token prediction against plain torch, from both formats."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from helexa.models import build_model
from support.hf_checkpoint import golden_config, golden_tensors, write_as_gguf, write_checkpoint
from support.model_runs import TOLERANCE, Caches, error_ratio, golden, load, run

CASES = ["qwen35_tied", "qwen35moe", "qwen3next"]
BESIDE = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "shared_head_norm": "norm"}


def head_tensors(case: str) -> dict[str, np.ndarray]:
    """Tensors of a head for a golden model: a layer like its attention layers, and what is around it."""
    config, rng = golden_config(case), np.random.default_rng(4)
    tensors = golden_tensors(case, config, fused_experts=False)
    full = next(name.split(".")[2] for name in tensors if name.endswith("self_attn.q_proj.weight"))
    size = config["hidden_size"]
    shapes = {
        name.replace(f"model.layers.{full}.", "mtp.layers.0."): data.shape
        for name, data in tensors.items()
        if name.startswith(f"model.layers.{full}.")
    } | {f"mtp.{name}.weight": (size,) for name in BESIDE.values()}
    shapes["mtp.fc.weight"] = (size, 2 * size)
    for name, shape in list(shapes.items()):
        if "self_attn" in name and name.endswith("_proj.weight"):
            shapes[name.removesuffix("weight") + "bias"] = shape[:1]
    return {
        name: (rng.standard_normal(shape) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)).astype(
            np.float32
        )
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def directory(case, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    config = golden_config(case)
    write_checkpoint(path, golden_tensors(case, config, fused_experts=False) | head_tensors(case))
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def gguf_file(directory, tmp_path_factory):
    return write_as_gguf(directory, tmp_path_factory.mktemp("gguf") / "model.gguf")


def norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight)


def rotated(x: Tensor, rotary_dim: int) -> Tensor:
    """The first dimensions of each head turned by their position; x: [T, heads, head_dim]."""
    half = rotary_dim // 2
    angles = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b, rest = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def attention(x: Tensor, weights: dict[str, Tensor], config: dict) -> Tensor:
    heads, kv_heads, dim = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    rotary_dim = int(dim * config["rope_parameters"]["partial_rotary_factor"])
    at = "self_attn."

    def projected(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{at}{name}_proj.weight"].T + weights[f"{at}{name}_proj.bias"]

    q, gate = projected(x, "q").reshape(len(x), heads, 2, dim).unbind(2)
    k, v = (projected(x, name).reshape(len(x), kv_heads, dim) for name in "kv")
    q = rotated(norm(q, weights[at + "q_norm.weight"]), rotary_dim)
    k = rotated(norm(k, weights[at + "k_norm.weight"]), rotary_dim)
    k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * dim**-0.5
    scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return projected((out * gate.sigmoid()).flatten(1), "o")


def swiglu(x: Tensor, weights: dict[str, Tensor], at: str) -> Tensor:
    gate, up = (x @ weights[f"{at}.{name}_proj.weight"].T for name in ("gate", "up"))
    return (torch.nn.functional.silu(gate) * up) @ weights[f"{at}.down_proj.weight"].T


def feed_forward(x: Tensor, weights: dict[str, Tensor], config: dict) -> Tensor:
    if "num_experts" not in config:
        return swiglu(x, weights, "mlp")
    chances = (x @ weights["mlp.gate.weight"].T).softmax(-1)
    best, chosen = chances.topk(config["num_experts_per_tok"])
    best = best / best.sum(-1, keepdim=True)
    every = torch.stack([swiglu(x, weights, f"mlp.experts.{n}") for n in range(config["num_experts"])], 1)
    mixed = (every.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1])) * best[..., None]).sum(1)
    shared = swiglu(x, weights, "mlp.shared_expert")
    return mixed + (x @ weights["mlp.shared_expert_gate.weight"].T).sigmoid() * shared


def reference(case: str, embedded: Tensor, hidden: Tensor, *, swapped: bool = False) -> Tensor:
    """What the head makes of embeddings of the next tokens and hidden states, [T, hidden_size] each."""
    config = golden_config(case)
    every = {name.removeprefix("mtp."): torch.from_numpy(data) for name, data in head_tensors(case).items()}
    layer = {name.removeprefix("layers.0."): data for name, data in every.items()}
    parts = [
        norm(embedded, every["pre_fc_norm_embedding.weight"]),
        norm(hidden, every["pre_fc_norm_hidden.weight"]),
    ]
    x = torch.cat(parts[::-1] if swapped else parts, -1) @ every["fc.weight"].T
    x = x + attention(norm(x, layer["input_layernorm.weight"]), layer, config)
    x = x + feed_forward(norm(x, layer["post_attention_layernorm.weight"]), layer, config)
    return norm(x, every["norm.weight"])


def caches_of_head(model) -> Caches:
    return Caches(replace(model.config, linear_attention=None, num_hidden_layers=1))


@pytest.mark.parametrize("source", ["directory", "gguf_file"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_head_computes_what_plain_torch_computes(case, source, chunk, request):
    config, weights = load(request.getfixturevalue(source))
    model = build_model(config, weights)
    token_ids = golden(case).token_ids
    hidden = model.hidden(Caches(config).step({0: token_ids}))[:-1]
    expected = reference(case, model.model.embed_tokens(token_ids[1:]), hidden)
    caches = caches_of_head(model)
    found = torch.cat(
        [
            model.mtp(caches.step({0: tokens}), part.contiguous())
            for tokens, part in zip(token_ids[1:].split(chunk), hidden.split(chunk), strict=True)
        ]
    )
    assert error_ratio(found, expected) < TOLERANCE
    head = model.lm_head.weights[0].dequantize()
    assert error_ratio(model.mtp.lm_head(found), expected @ head.T) < TOLERANCE
    swapped = reference(case, model.model.embed_tokens(token_ids[1:]), hidden, swapped=True)
    assert error_ratio(found, swapped) > 100 * TOLERANCE
    assert weights.unused() == []


def test_a_head_reads_its_own_output_in_the_next_round(case, directory):
    model = build_model(*load(directory))
    token_ids = golden(case).token_ids[:30]
    hidden = model.hidden(Caches(model.config).step({0: token_ids}))
    caches = caches_of_head(model)
    first = model.mtp(caches.step({0: token_ids[1:]}), hidden[:-1].contiguous())
    draft = model.mtp.lm_head(first[-1:]).argmax(-1).to(torch.int32)
    second = model.mtp(caches.step({0: draft}), first[-1:])
    tokens = torch.cat([token_ids[1:], draft])
    history = torch.cat([hidden[:-1], first[-1:]])
    expected = reference(case, model.model.embed_tokens(tokens), history)
    assert error_ratio(second, expected[-1:]) < TOLERANCE


@pytest.mark.parametrize("source", ["directory", "gguf_file"])
def test_a_head_is_no_part_of_the_model_proper(case, source, request):
    config, weights = load(request.getfixturevalue(source))
    assert config.num_mtp_layers == 1
    assert config.num_hidden_layers == golden(case).config.num_hidden_layers
    model = build_model(config, weights)
    assert error_ratio(run(model, golden(case).token_ids), golden(case).logits) < TOLERANCE


def test_a_model_without_a_head_has_none():
    assert golden("qwen35_tied").build().mtp is None
