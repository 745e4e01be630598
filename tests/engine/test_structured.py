"""Grammars and thinking through the whole engine: batches, preemption, seeds, ends, log-probabilities."""

import asyncio
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from helexa.engine import Engine, EngineOptions, GenerationProgress, GrammarSpec, SamplingParams, Thinking
from helexa.engine.guide import Guide
from helexa.engine.sampler import Sampler
from helexa.errors import InvalidParameter
from support.tiny_config import tiny_config

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["red", "blue"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "kind", "age"],
    "additionalProperties": False,
}
GRAMMAR = GrammarSpec("json_schema", json.dumps(SCHEMA))
THINKING = Thinking(open=True, budget=12)
PARAMS = SamplingParams(temperature=1.0, seed=7, max_tokens=600, grammar=GRAMMAR)


@pytest.fixture
def engine_of(history_model, tokenizer):
    """engine_of(**options): an engine over a model that guesses wildly, closed after the test."""
    engines = []
    rows = tokenizer.vocab_size + 3  # models may have more rows than their vocabulary has tokens

    def make(tokenizer=tokenizer, **options):
        config = tiny_config(rows)
        options = {"kv_dtype": "float32", "kv_cache_tokens": 4096, "capture": False} | options
        engine = Engine(
            lambda: history_model(rows), config, EngineOptions(**options), name="wild", tokenizer=tokenizer
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(engine_of):
    return engine_of()


async def answer(engine, params, prompt=(1, 2, 3), **keywords):
    """(text, deltas) of an answer."""
    deltas = [delta async for delta in engine.generate(prompt, params, **keywords)]
    return "".join(delta.text for delta in deltas), deltas


def check(text):
    """Fails unless the text is of SCHEMA."""
    value = json.loads(text)
    assert set(value) == {"name", "kind", "age"}
    assert len(value["name"]) <= 8
    assert value["kind"] in ("red", "blue")
    assert 0 <= value["age"] <= 99


@pytest.mark.parametrize("temperature", [0.0, 0.7, 5.0])
async def test_an_answer_follows_its_schema_and_ends_by_itself(engine, temperature):
    for seed in range(5):
        text, deltas = await answer(
            engine, replace(PARAMS, temperature=temperature, seed=seed, max_tokens=2000)
        )
        check(text)
        assert deltas[-1].finish_reason == "stop"


@pytest.mark.parametrize("broken", ["no mask", "never told", "told twice"])
async def test_a_sampler_that_gets_it_wrong_is_found_out(engine, monkeypatch, broken):
    if broken == "no mask":
        monkeypatch.setattr(Sampler, "_masked", lambda self, logits, allowed: logits)
    elif broken == "never told":
        monkeypatch.setattr(Guide, "accept", lambda self, token_id: token_id)
    else:
        told = Guide.accept
        monkeypatch.setattr(Guide, "accept", lambda self, token_id: told(self, told(self, token_id)))
    with pytest.raises((InvalidParameter, ValueError, AssertionError)):
        check((await answer(engine, replace(PARAMS, max_tokens=200)))[0])


async def test_a_block_of_thoughts_comes_first_and_the_answer_follows_the_schema(engine):
    text, deltas = await answer(engine, replace(PARAMS, thinking=THINKING))
    thoughts, end, reply = text.partition("</think>\n\n")
    assert end
    assert thoughts
    check(reply)
    usage = deltas[-1].usage
    closing = len(engine.tokenizer.encode(THINKING.closing))
    assert usage.reasoning_tokens == 12 + closing
    assert usage.completion_tokens > usage.reasoning_tokens


async def test_a_thinking_budget_holds_without_a_grammar_and_the_answer_begins(engine):
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=40, ignore_eos=True, thinking=THINKING)
    text, deltas = await answer(engine, params)
    assert deltas[-1].finish_reason == "length"
    assert text.count("</think>\n\n") >= 1
    assert len(text.partition("</think>\n\n")[2]) > 5
    assert deltas[-1].usage.completion_tokens == 40


@pytest.mark.parametrize("thinking", [None, THINKING, Thinking(open=False, budget=9)])
async def test_the_same_seed_gives_the_same_text_alone_in_a_batch_and_after_preemptions(engine_of, thinking):
    params = [replace(PARAMS, seed=seed, thinking=thinking) for seed in range(8)]
    params[0] = SamplingParams(temperature=1.0, seed=0, max_tokens=700, ignore_eos=True)
    prompts = [[i] * 250 for i in range(8)]
    roomy = engine_of(prefix_cache=False)
    alone = [(await answer(roomy, p, prompt))[0] for p, prompt in zip(params, prompts, strict=True)]
    tight = engine_of(max_context=1024, kv_cache_tokens=1024, max_sequences=8)
    together = await asyncio.gather(
        *(answer(tight, p, prompt) for p, prompt in zip(params, prompts, strict=True))
    )
    assert tight.stats().preemptions > 0
    assert [text for text, _ in together] == alone
    for text in alone[1:]:
        check(text.rpartition("</think>\n\n")[2])


async def test_several_choices_of_one_request_differ_and_all_follow_the_schema(engine):
    answers = await asyncio.gather(*(answer(engine, replace(PARAMS, seed=seed)) for seed in range(4)))
    for text, _ in answers:
        check(text)
    assert len({text for text, _ in answers}) == 4


async def test_a_grammar_ends_an_answer_even_if_ends_are_ignored(engine):
    params = replace(PARAMS, grammar=GrammarSpec("regex", "[0-9]+"), ignore_eos=True)
    text, deltas = await answer(engine, params)
    assert text.isdigit()
    assert deltas[-1].finish_reason == "stop"


async def test_too_few_tokens_end_an_answer_before_it_is_whole_and_it_says_so(engine):
    text, deltas = await answer(engine, replace(PARAMS, max_tokens=5))
    assert deltas[-1].finish_reason == "length"
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        json.loads(text)


async def test_a_stop_string_ends_the_answer_and_not_the_thoughts(engine):
    wide = Thinking(open=True, budget=30, closing="; stop it </think>\n\n")
    params = replace(PARAMS, thinking=wide, stop=(":", "stop"), grammar=GRAMMAR)
    text, deltas = await answer(engine, params)
    thoughts, _, reply = text.partition("</think>\n\n")
    assert thoughts.endswith("; stop it ")
    assert reply.endswith('"')
    assert ":" not in reply
    assert deltas[-1].finish_reason == "stop"


async def test_log_probabilities_are_those_of_the_tokens_that_are_allowed(engine):
    params = replace(PARAMS, grammar=GrammarSpec("regex", "[ab]c[0-9]"), logprobs=5, logit_bias={5: 10.0})
    text, deltas = await answer(engine, params)
    logprobs = [logprob for delta in deltas for logprob in delta.logprobs]
    assert len(logprobs) == len(text) == 3
    first, second, third = logprobs
    assert len(first.top) == 2
    assert math.isclose(sum(math.exp(p) for _, p in first.top), 1.0, rel_tol=1e-5)
    assert (second.logprob, second.top) == (0.0, [(second.token_id, 0.0)])
    assert len(third.top) == 5
    assert third.logprob < 0


async def test_a_bias_cannot_bring_back_what_the_grammar_excludes(engine, tokenizer):
    (z,) = tokenizer.encode("z")
    params = replace(PARAMS, grammar=GrammarSpec("regex", "[0-9]{20}"), logit_bias={z: 100.0})
    text, _ = await answer(engine, replace(params, presence_penalty=2.0, repetition_penalty=0.5))
    assert text.isdigit()


async def test_a_bad_grammar_is_refused_before_anything_runs(engine):
    bad = GrammarSpec("regex", "(")
    with pytest.raises(InvalidParameter, match="unclosed group"):
        await engine.check_grammar(bad)
    with pytest.raises(InvalidParameter, match="unclosed group"):
        await answer(engine, replace(PARAMS, grammar=bad))
    await engine.check_grammar(GRAMMAR)


async def test_without_a_vocabulary_there_is_no_grammar(engine_of):
    engine = engine_of(tokenizer=None)
    with pytest.raises(InvalidParameter, match="no vocabulary"):
        await engine.check_grammar(GRAMMAR)
    with pytest.raises(InvalidParameter, match="no vocabulary"):
        await answer(engine, SamplingParams(thinking=THINKING))


async def test_progress_grows_while_a_prompt_is_computed(engine_of):
    engine = engine_of(prefill_chunk=16)
    progress = GenerationProgress()
    seen = set()

    async def watch():
        while True:
            seen.add((progress.computed_tokens, progress.prompt_tokens, progress.is_prefilling))
            await asyncio.sleep(0)

    watcher = asyncio.create_task(watch())
    params = SamplingParams(max_tokens=3, temperature=0.0)
    await answer(engine, params, prompt=[1] * 1500, progress=progress)
    watcher.cancel()
    done = sorted(computed for computed, total, is_on in seen if is_on and total == 1500)
    assert len(done) > 3
    assert done == sorted(set(done))
    assert (progress.computed_tokens, progress.is_prefilling) == (1500, False)


async def test_the_highest_priority_is_served_first(engine_of):
    engine = engine_of(max_sequences=1)
    order = []

    async def ask(name, priority):
        await answer(engine, SamplingParams(max_tokens=20, temperature=0.0), priority=priority)
        order.append(name)

    names = [("first", 0), ("low", -1), ("plain", 0), ("high", 2), ("also plain", 0)]
    await asyncio.gather(*(ask(*name) for name in names))
    order.remove("first")  # it may have been taken before the others came
    assert order == ["high", "plain", "also plain", "low"]


def test_a_masked_row_keeps_what_is_allowed_and_nothing_else():
    sampler = Sampler(SamplingParams().resolve(), [])
    logits = np.arange(5, dtype=np.float32)
    masked = sampler._masked(logits, np.array([True, False, True]))
    assert masked.tolist() == [0.0, -math.inf, 2.0, -math.inf, -math.inf]
