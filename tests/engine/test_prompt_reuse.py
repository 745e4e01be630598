"""What an agent's requests find of earlier ones, on dense and hybrid models; it changes no answer."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from helexa.engine import Engine, SamplingParams
from helexa.errors import DeviceError
from helexa.ops.tensor import EMULATED

GOLDEN = Path(__file__).parents[1] / "golden"
HYBRIDS = ["qwen35_tied", "qwen35moe", "qwen3next"]
CASES = ["qwen3", *HYBRIDS]
VOCAB = 131


def text(length, seed):
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


SYSTEM = text(300, 0)  # ends within the second page


class Agent:
    """An engine, and one that computes every prompt anew to compare with."""

    def __init__(self, case, device, is_cuda):
        options = {"kv_dtype": "float32", "kv_cache_tokens": 8192, "num_threads": 2, "device": device}
        if is_cuda:  # where a token's bits are the same however many rows, up to a few, are beside it
            options["prefill_chunk"] = 8
        self.engine = Engine.load(GOLDEN / f"{case}.gguf", **options)
        self.fresh = Engine.load(GOLDEN / f"{case}.gguf", **options, prefix_cache=False)
        self.is_hybrid = self.engine.config.linear_attention is not None

    def close(self):
        self.engine.close()
        self.fresh.close()

    async def ask(self, prompt, borders, num_tokens=9, **options):
        """(the answer, how many tokens of the prompt were reused); it is that of the fresh engine."""
        tokens, chances, usage = await answer(self.engine, prompt, num_tokens, snapshot_at=borders, **options)
        expected, expected_chances, _ = await answer(self.fresh, prompt, num_tokens)
        assert tokens == expected
        np.testing.assert_allclose(chances, expected_chances, atol=1e-4)
        assert usage.cached_tokens + usage.prefill_tokens == len(prompt)
        return tokens, usage.cached_tokens


async def answer(engine, prompt, num_tokens, **options):
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, logprobs=1)
    deltas = [delta async for delta in engine.generate(prompt, params, **options)]
    chances = [chance.logprob for delta in deltas for chance in delta.logprobs]
    return [token_id for delta in deltas for token_id in delta.token_ids], chances, deltas[-1].usage


@pytest.fixture(params=CASES)
def agent(request, device):
    is_cuda = request.node.get_closest_marker("cuda") is not None
    if is_cuda and EMULATED:
        pytest.skip("hundreds of steps take too long on the host")
    agent = Agent(request.param, device, is_cuda)
    yield agent
    agent.close()


async def test_an_appended_turn_finds_the_whole_conversation_before_it(agent):
    prompt = [*SYSTEM, *text(50, 1)]
    for turn in range(3):
        reply, _ = await agent.ask(prompt, (300, len(prompt) - 2))
        known = len(prompt) + len(reply) - 1  # the last token is written, but nothing is computed of it
        prompt = [*prompt, *reply, *text(40 + 90 * turn, turn + 2)]
        _, reused = await agent.ask(prompt, (300, len(prompt) - 2))
        assert reused == known


async def test_an_edited_last_turn_finds_all_before_it(agent):
    await agent.ask([*SYSTEM, *text(50, 1)], (300, 348))
    _, reused = await agent.ask([*SYSTEM, *text(60, 2)], (300, 358))
    assert reused == 300


async def test_a_regenerated_answer_finds_its_prompt(agent):
    prompt = [*SYSTEM, *text(50, 1)]
    await agent.ask(prompt, (300, 345))
    for _ in range(2):
        _, reused = await agent.ask(prompt, (300, 345))
        assert reused == (345 if agent.is_hybrid else 349)


async def test_subagents_share_their_system_prompt_one_after_the_other(agent):
    for number in range(4):
        prompt = [*SYSTEM, number, *text(70, number)]
        _, reused = await agent.ask(prompt, (300, len(prompt) - 2))
        assert reused == (300 if number else 0)


async def test_subagents_that_start_together_compute_their_system_prompt_once(agent):
    prompts = [[*SYSTEM, number, *text(70, number)] for number in range(4)]
    results = await asyncio.gather(*(agent.ask(prompt, (300, 369)) for prompt in prompts))
    reused = sorted(cached for _, cached in results)
    # Dense models pick up full pages while they take turns, if a turn brings them that far.
    if agent.is_hybrid:
        assert reused == [0, 300, 300, 300]
    elif agent.engine.options.prefill_tokens >= 256:
        assert sum(reused) >= 3 * 256


async def test_two_alternating_conversations_both_find_their_own(agent):
    prompts = [[*text(280, seed), *text(30, 9)] for seed in (20, 30)]
    known = [0, 0]
    for turn in range(3):
        for which in range(2):
            prompt = prompts[which]
            reply, reused = await agent.ask(prompt, (280, len(prompt) - 2))
            assert reused == known[which]
            known[which] = len(prompt) + len(reply) - 1
            prompts[which] = [*prompt, *reply, *text(33, turn)]


async def test_a_long_prompt_can_be_left_anywhere_at_regular_places(agent):
    agent.engine._host.core.scheduler.holdings.snapshot_interval = 256
    prompt = text(600, 3)
    await agent.ask(prompt, ())
    _, reused = await agent.ask([*prompt[:550], *text(30, 4)], ())
    assert reused == (512 if agent.is_hybrid else 550)


async def test_after_a_cancellation_everything_is_as_if_it_had_never_started(agent):
    prompt = [*SYSTEM, *text(50, 1)]
    for num_deltas in (1, 3):
        deltas = agent.engine.generate(prompt, SamplingParams(temperature=0.0, max_tokens=600))
        for _ in range(num_deltas):
            await anext(deltas)
        await deltas.aclose()
        await agent.ask(prompt, (300,))
        await agent.ask([*prompt[:320], *text(40, 8)], (300,))


async def test_choices_of_one_prompt_are_computed_once(agent):
    prompt = [*SYSTEM, *text(50, 1)]
    await agent.ask(prompt, None)
    results = await asyncio.gather(*(agent.ask(prompt, None) for _ in range(3)))
    assert [reused for _, reused in results] == [len(prompt) - 1] * 3


async def test_nothing_is_found_in_another_namespace(agent):
    prompt = [*SYSTEM, *text(50, 1)]
    await agent.ask(prompt, None, namespace="one")
    assert (await agent.ask(prompt, None, namespace="other"))[1] == 0
    assert (await agent.ask(prompt, None, namespace="one"))[1] == len(prompt) - 1


async def test_a_state_of_which_no_number_came_is_not_used_again():
    engine = Engine.load(GOLDEN / "qwen35_tied.gguf", kv_cache_tokens=2048, num_threads=2)
    try:
        await answer(engine, SYSTEM, 3)
        slots = [snapshot.slot for snapshot in engine._host.core.prefix.snapshots._kept.values()]
        for slot in slots:
            engine._host.core.runner.states.recurrent[0][slot] = float("nan")
        with pytest.raises(DeviceError, match="not finite"):
            await answer(engine, SYSTEM, 3)
        _, chances, usage = await answer(engine, SYSTEM, 3)
        assert usage.cached_tokens == 0
        assert np.isfinite(chances).all()
    finally:
        engine.close()


@pytest.mark.parametrize("case", HYBRIDS)
async def test_a_state_that_is_not_brought_back_would_be_noticed(case, monkeypatch):
    agent = Agent(case, "cpu", is_cuda=False)
    try:
        await agent.ask(SYSTEM, None)
        monkeypatch.setattr(agent.engine._host.core.prefix.snapshots, "_copy", lambda source, target: None)
        agent.engine._host.core.runner.states.recurrent[0].zero_()
        with pytest.raises(AssertionError):
            await agent.ask(SYSTEM, None)
    finally:
        agent.close()
