"""Tiny models through the CUDA kernels: captured, batched, continued and interrupted as they are served."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from helexa.engine import Engine, SamplingParams
from helexa.engine.state_store import StateStore
from helexa.errors import DevicePoisoned, OutOfMemory

pytestmark = pytest.mark.cuda

GOLDEN = Path(__file__).parents[1] / "golden"
DENSE, HYBRID = "qwen3", "qwen35_tied"
CASES = [DENSE, "qwen3moe", "qwen3next", HYBRID, "qwen35moe"]


@pytest.fixture
def load(cuda_device):
    """load(case, **options): an engine that is closed after the test."""
    engines = []

    def make(case, **options):
        sizes = {"kv_dtype": "float32", "kv_cache_tokens": 2048, "num_threads": 1, "device": cuda_device}
        engines.append(Engine.load(GOLDEN / f"{case}.gguf", **(sizes | options)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def tokens_of(case):
    return np.load(GOLDEN / f"{case}.npz")["token_ids"].tolist()


async def deltas_of(engine, prompt, **params):
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": 8} | params))
    return [delta async for delta in engine.generate(prompt, params)]


async def answer(engine, prompt, **params):
    """All of an answer's tokens, and the last delta."""
    deltas = await deltas_of(engine, prompt, **params)
    return [token_id for delta in deltas for token_id in delta.token_ids], deltas[-1]


def greedy(engine, prompt, num_tokens=8):
    """The answer by teacher forcing alone."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(engine.logits(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("case", CASES)
async def test_generation_equals_teacher_forcing(load, case):
    engine = load(case)
    prompt = tokens_of(case)[:8]  # with the answer not more tokens than are computed alike in any number
    wanted = await asyncio.to_thread(greedy, engine, prompt)
    assert (await answer(engine, prompt))[0] == wanted


@pytest.mark.parametrize("case", CASES)
async def test_a_cached_prefix_changes_a_token_s_probability_by_rounding_alone(load, case):
    engine = load(case)
    prompt, chances = tokens_of(case)[:40], []
    for cached in (0, 39):
        deltas = await deltas_of(engine, prompt, logprobs=1)
        assert deltas[-1].usage.cached_tokens == cached
        chances.append(deltas[0].logprobs[0].logprob)
    assert abs(chances[0] - chances[1]) < 0.2


@pytest.mark.parametrize("case", CASES)
async def test_a_batch_gives_what_each_prompt_gives_alone(load, case):
    engine = load(case, prefix_cache=False)
    tokens = tokens_of(case)
    prompts = [tokens[i : i + 10 + 7 * i] for i in range(5)]
    params = [{"temperature": 0.8 * (i % 2), "seed": i, "top_p": 0.9} for i in range(5)]
    alone = [(await answer(engine, prompt, **how))[0] for prompt, how in zip(prompts, params, strict=True)]
    together = await asyncio.gather(
        *(answer(engine, prompt, **how) for prompt, how in zip(prompts, params, strict=True))
    )
    assert [token_ids for token_ids, _ in together] == alone


@pytest.mark.parametrize("case", CASES)
async def test_a_sequence_that_was_stopped_has_left_nothing_but_its_own_tokens(load, case):
    engine, fresh = load(case), load(case, prefix_cache=False)
    prompt = tokens_of(case)[:40]
    free, _ = await answer(fresh, prompt, max_tokens=12)
    stop = next(token for index, token in enumerate(free) if index > 2 and token not in free[:index])
    stopped, last = await answer(engine, prompt, max_tokens=12, stop_token_ids=(stop,))
    length = free.index(stop)
    assert stopped == free[:length]
    assert last.finish_reason == "stop"
    assert last.usage.completion_tokens == length + 1
    # The step that was under way has computed the last token; what it chose after that is nowhere.
    longer = [*prompt, *free[: length + 1], *tokens_of(case)[:5]]
    found, last = await answer(engine, longer)
    assert last.usage.cached_tokens >= len(prompt)
    assert found == (await answer(fresh, longer))[0]


@pytest.mark.parametrize("case", CASES)
async def test_captured_steps_give_what_eager_ones_give(load, case):
    prompts = [tokens_of(case)[i : 20 + i] for i in range(3)]
    answers = []
    for capture in (True, False):
        engine = load(case, capture=capture)
        found = await asyncio.gather(
            *(deltas_of(engine, prompt, temperature=0.7, seed=3, logprobs=4) for prompt in prompts)
        )
        # How many tokens share a delta is a matter of time.
        answers.append([[one for delta in deltas for one in delta.logprobs or []] for deltas in found])
    assert answers[0] == answers[1]


async def test_sequences_that_give_way_go_on_where_they_were(load):
    engine = load(DENSE, kv_cache_tokens=768, max_context=700, prefix_cache=False)
    prompts = [(tokens_of(DENSE) * 4)[i : 250 + i] for i in range(3)]
    alone = [(await answer(engine, prompt, max_tokens=12))[0] for prompt in prompts]
    together = await asyncio.gather(*(answer(engine, prompt, max_tokens=12) for prompt in prompts))
    assert engine.stats().preemptions > 0
    assert [token_ids for token_ids, _ in together] == alone


async def test_a_request_without_memory_fails_alone(load, monkeypatch):
    engine = load(DENSE)
    prompt = tokens_of(DENSE)[:30]
    wanted, _ = await answer(engine, prompt)
    runner = engine._host.core.runner
    model, calls = runner._model, []

    def failing(step):
        calls.append(len(step.token_ids))
        if len(step.token_ids) > 40:
            raise torch.OutOfMemoryError("no room for the activations")
        return model(step)

    for owner in (runner, runner._prompts):
        monkeypatch.setattr(owner, "_model", failing)
    with pytest.raises(OutOfMemory, match="too little free memory for this request"):
        await answer(engine, [5, *tokens_of(DENSE)])
    assert (await answer(engine, prompt))[0] == wanted
    assert engine.stats().poisoned is None


async def test_a_fault_of_the_device_reaches_everyone(load, monkeypatch):
    engine = load(DENSE)

    def failing(step):
        raise RuntimeError("an illegal memory access was encountered")

    runner = engine._host.core.runner
    for owner in (runner, runner._prompts):
        monkeypatch.setattr(owner, "_model", failing)
    with pytest.raises(DevicePoisoned, match="illegal memory access"):
        await answer(engine, tokens_of(DENSE)[:30])
    with pytest.raises(DevicePoisoned):
        await answer(engine, [1, 2, 3])


@pytest.mark.parametrize("case", [DENSE, HYBRID])
async def test_what_the_caches_held_outlives_the_engine(load, case, tmp_path):
    prompt, first = tokens_of(case)[:50], None
    for _ in range(2):
        engine = load(case, store=StateStore(path=tmp_path, max_bytes=2**30))
        if first is None:
            first, _ = await answer(engine, prompt)
            prompt = [*prompt, *first, 3, 1, 4]
        else:
            second, last = await answer(engine, prompt)
            assert last.usage.cached_tokens >= 56
        await asyncio.to_thread(engine.close)
    assert second == (await answer(load(case), prompt))[0]


async def test_embeddings_are_those_of_one_step(load):
    engine, chunked = load(DENSE), load(DENSE, prefill_chunk=16)
    tokens = tokens_of(DENSE)[:50]
    for pooling in ("mean", "last"):
        whole, parts = await engine.embed(tokens, pooling), await chunked.embed(tokens, pooling)
        assert np.linalg.norm(whole) == pytest.approx(1.0)
        assert float(whole @ parts) > 0.999
        assert float(whole @ await engine.embed(tokens[::-1], pooling)) < 0.99
