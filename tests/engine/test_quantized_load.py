"""Models quantized while they load compute what the quantized file computes, wherever they come from."""

import os
from pathlib import Path

import numpy as np
import pytest

from helexa.engine.engine import Engine
from helexa.weights.load import GGUFWeights
from helexa.weights.model_file import open_model
from helexa.weights.quantize import write_quantized
from helexa.weights.recipes import find_recipe
from support.hf_checkpoint import GOLDEN, Layout, write_golden
from support.model_runs import golden

CASES = ["llama_linear_rope_two_pages", "qwen3", "qwen3moe", "qwen3next", "qwen35_tied", "qwen35moe"]
QUANT = "q8_0"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HELEXA_CACHE", str(tmp_path / "cache"))


def logits(path: Path, case: str, **options: object) -> np.ndarray:
    with Engine.load(path, max_context=512, num_threads=1, kv_dtype="float32", **options) as engine:
        return engine.logits(golden(case).token_ids.tolist()[:40])


def written(path: Path, target: Path) -> Path:
    with open_model(path) as file:
        write_quantized(file, target, find_recipe(QUANT))
    return target


@pytest.mark.parametrize("case", CASES)
def test_quantized_in_memory_on_disk_or_before_it_is_the_same_model(case, tmp_path):
    path = GOLDEN / f"{case}.gguf"
    expected = logits(written(path, tmp_path / "q.gguf"), case)
    assert np.array_equal(expected, logits(path, case, quant=QUANT, quant_cache=False))
    assert np.array_equal(expected, logits(path, case, quant=QUANT))
    assert np.array_equal(expected, logits(path, case, quant=QUANT))  # from the cache
    plain = logits(path, case)
    # Random weights amplify: where the rounding decides between experts, single rows differ by far more.
    rmse = np.sqrt(((expected - plain) ** 2).mean(axis=1) / plain.var(axis=1))
    assert 0 < np.median(rmse) < 0.1


@pytest.mark.parametrize("case", CASES)
def test_a_directory_is_quantized_as_the_file_of_the_same_weights(case, tmp_path):
    """Whose fused projections, stacked experts and head orders are put together while they are read."""
    directory = write_golden(case, tmp_path / "tiny", Layout(num_files=2))
    expected = logits(written(GOLDEN / f"{case}.gguf", tmp_path / "q.gguf"), case)
    for found in (
        logits(directory, case, quant=QUANT, quant_cache=False),
        logits(directory, case, quant=QUANT),
        logits(written(directory, tmp_path / "d.gguf"), case),
    ):
        assert np.allclose(found, expected, rtol=0, atol=1e-4 * expected.std())


def test_a_load_tells_how_far_it_is(tmp_path):
    phases = []
    path = GOLDEN / "qwen3.gguf"
    with Engine.load(path, max_context=512, quant=QUANT, progress=phases.append):
        assert list(dict.fromkeys(step.phase for step in phases)) == [
            "quantize",
            "header",
            "weights",
            "ready",
        ]
    phases.clear()
    with Engine.load(path, max_context=512, quant=QUANT, progress=phases.append):
        assert list(dict.fromkeys(step.phase for step in phases)) == ["header", "weights", "ready"]


def test_weights_of_a_view_equal_those_of_the_file(tmp_path):
    with (
        open_model(GOLDEN / "qwen3.gguf") as source,
        open_model(written(GOLDEN / "qwen3.gguf", tmp_path / "q.gguf")) as file,
    ):
        name = "blk.0.attn_q.weight"
        assert source.tensors[name].format != file.tensors[name].format == QUANT
        weight = GGUFWeights(file).linear(name)
        assert (weight.format, weight.rows) == (QUANT, source.tensors[name].num_rows)


@pytest.mark.cuda
@pytest.mark.parametrize("case", ["qwen3", "qwen35moe"])
def test_a_device_quantizes_and_keeps_nothing_on_disk(case, cuda_device, tmp_path, monkeypatch):
    device = {} if cuda_device == "cpu" else {"device": cuda_device}
    path = GOLDEN / f"{case}.gguf"
    expected = logits(written(path, tmp_path / "q.gguf"), case, **device)
    monkeypatch.setattr("helexa.ops.quantize", lambda *_: pytest.fail("quantized by the host"))
    assert np.array_equal(expected, logits(path, case, quant=QUANT, **device))
    assert not [*tmp_path.rglob("*/quantized/*")]


@pytest.mark.cuda
@pytest.mark.parametrize("case", ["qwen3moe", "qwen35moe"])
def test_a_device_quantizes_a_directory_too(case, cuda_device, tmp_path):
    """Its experts are read where they lie, each in a place of its own."""
    device = {} if cuda_device == "cpu" else {"device": cuda_device}
    directory = write_golden(case, tmp_path / "tiny", Layout(num_files=2))
    with open_model(directory) as file:
        (stack,) = [name for name in file.tensors if name.startswith("blk.0.ffn_down_exps")]
        info = file.tensors[stack]
        ranges = file.row_ranges(stack, 5, info.num_rows - 3)
        read = b"".join(os.pread(descriptor, nbytes, offset) for descriptor, offset, nbytes in ranges)
        assert read == bytes(file.rows(stack, 5, info.num_rows - 3))
    expected = logits(written(directory, tmp_path / "d.gguf"), case, **device)
    assert np.array_equal(expected, logits(directory, case, quant=QUANT, **device))
