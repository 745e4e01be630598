"""Tiny random models: what the engine computes in chunks, batches and replays is what their authors did."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from helexa.engine import Engine, SamplingParams
from helexa.engine.cache import KVCache, StateCache
from helexa.engine.cpu_runner import CpuRunner
from helexa.engine.sequence import Sequence
from helexa.models import build_model, config_from_gguf, kv_cache_shapes
from helexa.weights.gguf import open_gguf
from helexa.weights.load import GGUFWeights

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(json.loads((GOLDEN / "manifest.json").read_text())["cases"])


@pytest.fixture
def load():
    """load(case, **options): an engine that is closed after the test."""
    engines = []

    def make(case, **options):
        options = {"kv_dtype": "float32", "kv_cache_tokens": 2048, "num_threads": 2} | options
        engines.append(Engine.load(GOLDEN / f"{case}.gguf", **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


async def answer(engine, prompt, num_tokens=12):
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens)
    deltas = [delta async for delta in engine.generate(prompt, params)]
    return [token_id for delta in deltas for token_id in delta.token_ids], deltas[-1].usage


def greedy(engine, prompt, num_tokens=12):
    """The answer by teacher forcing alone."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(engine.logits(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("chunk", [512, 13])
@pytest.mark.parametrize("case", CASES)
def test_teacher_forced_logits_are_those_of_transformers(load, case, chunk):
    golden = np.load(GOLDEN / f"{case}.npz")
    logits = load(case, prefill_chunk=chunk).logits(golden["token_ids"].tolist())
    assert logits.dtype == np.float32
    scale = float(np.sqrt(np.mean(golden["logits"] ** 2)))
    np.testing.assert_allclose(logits, golden["logits"], atol=2e-4 * scale, rtol=0)


@pytest.mark.parametrize("case", CASES)
async def test_generation_equals_teacher_forcing_also_on_a_cached_prefix(load, case):
    engine = load(case)
    prompt = np.load(GOLDEN / f"{case}.npz")["token_ids"].tolist()[:40]
    wanted = await asyncio.to_thread(greedy, engine, prompt)
    first, usage = await answer(engine, prompt)
    assert (first, usage.cached_tokens) == (wanted, 0)
    again, usage = await answer(engine, prompt)
    assert (again, usage.cached_tokens) == (wanted, 39)


@pytest.mark.parametrize("case", ["qwen3", "qwen3moe", "qwen3next", "qwen35_tied", "qwen35moe"])
async def test_a_batch_gives_what_each_prompt_gives_alone(load, case):
    engine = load(case, prefix_cache=False)
    tokens = np.load(GOLDEN / f"{case}.npz")["token_ids"].tolist()
    prompts = [tokens[i : i + 10 + 7 * i] for i in range(5)]
    alone = [(await answer(engine, prompt))[0] for prompt in prompts]
    together = await asyncio.gather(*(answer(engine, prompt) for prompt in prompts))
    assert [token_ids for token_ids, _ in together] == alone


@pytest.mark.parametrize("num_sequences", [1, 2, 3, 4])
def test_a_replayed_step_equals_an_eager_one_bit_for_bit(num_sequences):
    with open_gguf(GOLDEN / "llama.gguf") as file:
        config = config_from_gguf(file.metadata, file.tensors)
        model = build_model(config, GGUFWeights(file))
    tokens = np.load(GOLDEN / "llama.npz")["token_ids"].tolist()
    results = []
    for capture in (True, False):
        # 4 sequences, 5 pages: the scratch page starts as NaN and must not reach anyone.
        cache = KVCache(kv_cache_shapes(config, 5), torch.float32)
        for tensor in (*cache.k, *cache.v):
            tensor.fill_(float("nan"))
        runner = CpuRunner(model, cache, StateCache([]), max_sequences=4, max_context=256, capture=capture)
        sequences = [Sequence(tokens[i : 20 + 3 * i], 100) for i in range(num_sequences)]
        with torch.no_grad():
            for i, sequence in enumerate(sequences):
                sequence.pages = [4 - i]
                runner.prefill(sequence, len(sequence.token_ids) - 1)
                sequence.num_computed = len(sequence.token_ids) - 1
            steps = []
            for _ in range(4):
                rows = runner.decode(sequences)[:num_sequences]
                steps.append(torch.stack(list(rows)).clone())
                for sequence, row in zip(sequences, rows, strict=True):
                    sequence.num_computed += 1
                    sequence.token_ids.append(int(row.argmax()))
        results.append(torch.stack(steps))
    assert torch.isfinite(results[0]).all()
    assert torch.equal(*results)


def test_prefill_gives_logits_only_where_they_are_wanted():
    with open_gguf(GOLDEN / "llama.gguf") as file:
        config = config_from_gguf(file.metadata, file.tensors)
        model = build_model(config, GGUFWeights(file))
    runner = CpuRunner(
        model,
        KVCache(kv_cache_shapes(config, 2), torch.float32),
        StateCache([]),
        max_sequences=1,
        max_context=256,
    )
    sequence = Sequence([1, 2, 3, 4, 5, 6], 10)
    sequence.pages = [1]
    with torch.no_grad():
        assert runner.prefill(sequence, 4).shape == (0, config.vocab_size)
        sequence.num_computed = 4
        assert runner.prefill(sequence, 2, all_rows=True).shape == (2, config.vocab_size)
        assert runner.prefill(sequence, 2).shape == (1, config.vocab_size)
