"""The files that benchmarks measure are whole models: of every family, with a vocabulary, and finite."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from helexa.engine import Engine
from helexa.weights.model_file import open_model

_SPEC = importlib.util.spec_from_file_location(
    "random_models", Path(__file__).parents[1] / "bench/random_models.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
random_models = sys.modules["random_models"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(random_models)

SIZES = {"num_layers": 8, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 256, "vocab_size": 1000}
SMALL = {
    "dense": random_models.Shape(architecture="qwen3", quant="q4_k_m", intermediate_size=512, **SIZES),
    "tied": random_models.Shape(
        architecture="qwen3", quant="q8_0", intermediate_size=288, is_tied=True, **SIZES
    ),
    "experts": random_models.Shape(
        architecture="qwen3moe", quant="q4_k_m", num_experts=16, expert_size=256, **SIZES
    ),
    "hybrid": random_models.Shape(
        architecture="qwen35",
        quant="q6_k",
        intermediate_size=512,
        linear_k_heads=2,
        linear_v_heads=4,
        head_dim=128,
        **SIZES,
    ),
    "hybrid experts": random_models.Shape(
        architecture="qwen35moe",
        quant="q4_k_m",
        num_experts=16,
        expert_size=256,
        linear_k_heads=2,
        linear_v_heads=4,
        head_dim=128,
        **SIZES,
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_written_model_answers_in_finite_numbers_that_depend_on_the_prompt(name, tmp_path):
    path = tmp_path / "model.gguf"
    assert random_models.write_model(SMALL[name], name, path) == path.stat().st_size
    with Engine.load(path, max_context=256, max_sequences=1, num_threads=1) as engine:
        assert engine.name == name
        assert engine.tokenizer.vocab_size == 1000
        text = "helexa serves models<|im_end|>"
        token_ids = engine.tokenizer.encode(text, parse_special=True)
        assert engine.tokenizer.decode(token_ids) == text
        logits, others = engine.logits(token_ids), engine.logits(token_ids[::-1])
    assert np.isfinite(logits).all()
    assert logits.std() > 1e-3
    assert not np.allclose(logits[-1], others[-1])


def test_the_best_format_goes_to_the_layers_that_llama_cpp_gives_it(tmp_path):
    random_models.write_model(SMALL["dense"], "dense", tmp_path / "model.gguf")
    with open_model(tmp_path / "model.gguf") as file:
        down = [file.tensors[f"blk.{layer}.ffn_down.weight"].format for layer in range(8)]
        assert file.tensors["output.weight"].format == "q6_k"
    assert [layer for layer, format in enumerate(down) if format == "q6_k"] == [0, 3, 6, 7]


def test_a_file_that_is_there_is_not_written_again(tmp_path):
    path = tmp_path / "model.gguf"
    size = random_models.write_model(SMALL["tied"], "tied", path)
    path.write_bytes(bytes(size))
    random_models.write_model(SMALL["tied"], "tied", path)
    assert path.read_bytes() == bytes(size)
