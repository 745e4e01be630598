"""Conversations that outlive the engine, on dense and hybrid models."""

import asyncio
import logging
from pathlib import Path

import numpy as np
import pytest

from helexa.engine import Engine, SamplingParams
from helexa.engine.state_store import StateStore

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["qwen3", "qwen35_tied", "qwen35moe", "qwen3next"]
ROOM = 2**30


def text(length, seed):
    return np.random.default_rng(seed).integers(0, 131, length).tolist()


async def ask(engine, prompt, borders=None, num_tokens=9, **options):
    """The answer, its chances, and how many tokens of the prompt were reused."""
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, logprobs=1)
    deltas = [delta async for delta in engine.generate(prompt, params, snapshot_at=borders, **options)]
    chances = [chance.logprob for delta in deltas for chance in delta.logprobs]
    usage = deltas[-1].usage
    assert usage.cached_tokens + usage.prefill_tokens == len(prompt)
    return [token_id for delta in deltas for token_id in delta.token_ids], chances, usage.cached_tokens


@pytest.fixture
def load():
    """load(case, store, **options): an engine, as if the process had just started if the store is new."""
    engines = []

    def make(case, store=None, **options):
        options = {"kv_dtype": "float32", "kv_cache_tokens": 4096, "num_threads": 2} | options
        engines.append(Engine.load(GOLDEN / f"{case}.gguf", store=store, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(params=["disk", "memory"])
def restarted(request, tmp_path):
    """A function that gives the store as a new process, or the next model of this one, would find it."""
    kept = StateStore(host_bytes=ROOM)
    return lambda: kept if request.param == "memory" else StateStore(path=tmp_path / "state", max_bytes=ROOM)


@pytest.mark.parametrize("case", CASES)
async def test_after_a_restart_only_the_new_turn_is_computed(load, restarted, case):
    prompt = text(700, 0)
    engine = load(case, restarted())
    reply, _, _ = await ask(engine, prompt)
    engine.close()
    turn = [*prompt, *reply, *text(30, 1)]
    engine = load(case, restarted())
    found = await ask(engine, turn)
    assert found[2] == len(prompt) + len(reply) - 1
    stats = engine.stats()
    assert stats.stored_tokens == stats.cached_tokens == found[2]
    is_hybrid = engine.config.linear_attention is not None
    assert (stats.snapshots_used > 0, stats.snapshots_used <= stats.snapshots_total) == (is_hybrid, True)
    expected = await ask(load(case, prefix_cache=False), turn)
    assert found[0] == expected[0]
    np.testing.assert_allclose(found[1], expected[1], atol=1e-4)
    # From memory now.
    assert (await ask(engine, [*turn, *found[0], *text(30, 2)]))[2] == len(turn) + len(found[0]) - 1
    assert engine.stats().stored_tokens == stats.stored_tokens < engine.stats().cached_tokens


@pytest.mark.parametrize("case", CASES)
async def test_after_a_restart_a_shared_system_prompt_is_found(load, restarted, case):
    system = text(600, 0)
    engine = load(case, restarted())
    await ask(engine, [*system, *text(50, 1)], (600,))
    engine.close()
    engine = load(case, restarted())
    is_hybrid = engine.config.linear_attention is not None
    reused = [(await ask(engine, [*system, *text(50, seed)], (600,)))[2] for seed in (2, 3)]
    # Dense models find whole pages, or the very end.
    assert reused == ([600, 600] if is_hybrid else [512, 600])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [255, 256, 257, 512, 513])
async def test_tails_of_any_length_come_back(load, restarted, case, length):
    prompt = text(length, 0)
    engine = load(case, restarted())
    reply, _, _ = await ask(engine, prompt, num_tokens=1)
    engine.close()
    turn = [*prompt, *reply, *text(8, 1)]
    found = await ask(load(case, restarted()), turn)
    assert found[2] == length
    assert found[0] == (await ask(load(case, prefix_cache=False), turn))[0]


@pytest.mark.parametrize("case", ["qwen3", "qwen35_tied"])
async def test_damaged_files_are_ignored_with_a_line_in_the_log(load, tmp_path, case, caplog):
    prompt = text(700, 0)
    engine = load(case, StateStore(path=tmp_path, max_bytes=ROOM))
    expected = await ask(engine, prompt)
    engine.close()
    for path in tmp_path.iterdir():
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        found = await ask(load(case, StateStore(path=tmp_path, max_bytes=ROOM)), prompt)
    assert found == expected
    assert "state_ignored" in caplog.messages


@pytest.mark.parametrize("case", ["qwen3", "qwen35_tied"])
async def test_what_is_evicted_from_memory_comes_back(load, case):
    prompts = [text(500, seed) for seed in range(4)]
    engine = load(case, StateStore(host_bytes=ROOM), kv_cache_tokens=1024)
    for _ in range(3):
        answers = [await ask(engine, prompt) for prompt in prompts]
        reused = [cached for _, _, cached in answers]
    assert reused == [499] * 4 if engine.config.linear_attention is not None else min(reused) >= 256


async def test_another_model_or_another_type_of_cache_finds_nothing(load):
    store = StateStore(host_bytes=ROOM)
    prompt = text(300, 0)
    engine = load("qwen3", store)
    await ask(engine, prompt)
    engine.close()
    for case, options in (("llama", {}), ("qwen3", {"kv_dtype": "float16"})):
        assert (await ask(load(case, store, **options), prompt))[2] == 0
    assert (await ask(load("qwen3", store), prompt))[2] > 0


async def test_namespaces_are_kept_apart(load):
    store = StateStore(host_bytes=ROOM)
    prompt = text(300, 0)
    engine = load("qwen3", store)
    await ask(engine, prompt, namespace="one")
    engine.close()
    engine = load("qwen3", store)
    assert (await ask(engine, prompt, namespace="other"))[2] == 0
    assert (await ask(engine, prompt, namespace="one"))[2] > 0


async def test_everything_is_saved_while_there_is_nothing_else_to_do(load):
    store = StateStore(host_bytes=ROOM)
    engine = load("qwen35_tied", store)
    prompt = text(700, 0)
    await ask(engine, prompt)
    # Nothing is left to do when it is closed, which happens after the other one has been asked.
    while engine._host.worker.call(lambda: list(engine._host.core.archive._unsaved())).result():
        await asyncio.sleep(0.001)
    assert (await ask(load("qwen35_tied", store), prompt))[2] == 699
