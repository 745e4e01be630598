"""The engine from the outside: threads, event loops and text, over a model that proves its cache."""

import asyncio
import contextlib
import threading
import time

import numpy as np
import pytest
import torch

from helexa.engine import Engine, EngineOptions, SamplingParams
from helexa.errors import (
    ContextTooLong,
    DevicePoisoned,
    InvalidParameter,
    OutOfMemory,
    ShuttingDown,
)
from support.tiny_config import tiny_config

VOCAB = 26
CONFIG = tiny_config(VOCAB)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


class Letters:
    """A vocabulary whose tokens are the letters of the alphabet."""

    vocab_size = VOCAB
    eos_token_ids = frozenset()

    def token_bytes(self, token_id):
        return bytes([ord("a") + token_id])

    def is_special(self, token_id):
        return False


class Gate:
    """A model that waits at every call until it is let through."""

    def __init__(self, model):
        self.model = model
        self.passes = threading.Semaphore(0)

    def __call__(self, step):
        assert self.passes.acquire(timeout=30)
        return self.model(step)


@pytest.fixture
def engine_of(history_model):
    """engine_of(model, **options): an engine that is closed after the test."""
    engines = []

    def make(model=None, tokenizer=None, **options):
        options = {"kv_dtype": "float32", "kv_cache_tokens": 4096, "capture": False} | options
        engine = Engine(
            lambda: history_model(VOCAB) if model is None else model,
            CONFIG,
            EngineOptions(**options),
            name="history",
            tokenizer=Letters() if tokenizer is None else tokenizer,
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(engine_of):
    return engine_of()


async def collect(engine, prompt, params=GREEDY, **keywords):
    """(text, token ids, last delta) of an answer."""
    text, token_ids, delta = "", [], None
    async for delta in engine.generate(prompt, params, **keywords):
        text += delta.text
        token_ids += delta.token_ids
    return text, token_ids, delta


def letters(token_ids):
    return "".join(chr(ord("a") + token_id) for token_id in token_ids)


async def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        await asyncio.sleep(0.002)


async def test_an_answer_has_text_tokens_reason_and_usage(engine, expected):
    text, token_ids, last = await collect(engine, [1, 2, 3])
    assert token_ids == expected([1, 2, 3], 8, VOCAB)
    assert text == letters(token_ids)
    assert last.finish_reason == "length"
    usage = last.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (3, 8, 0)
    assert usage.prefill_tokens == 3
    assert usage.prefill_ms > 0
    assert usage.decode_ms > 0


async def test_the_same_seed_gives_the_same_text(engine):
    params = SamplingParams(temperature=5.0, max_tokens=30, seed=7)
    first, again = [await collect(engine, [1, 2, 3], params) for _ in range(2)]
    assert first[0] == again[0]
    other = await collect(engine, [1, 2, 3], SamplingParams(temperature=5.0, max_tokens=30, seed=8))
    assert other[0] != first[0]


async def test_answers_in_a_batch_are_those_given_alone(engine, expected):
    prompts = [[i, 2 * i, 5] for i in range(7)]
    answers = await asyncio.gather(*(collect(engine, prompt) for prompt in prompts))
    assert [answer[1] for answer in answers] == [expected(prompt, 8, VOCAB) for prompt in prompts]


async def test_a_stop_string_ends_the_answer_and_is_never_sent(engine, expected):
    tokens = expected([4, 4], 40, VOCAB)
    stop = letters(tokens[20:23])
    whole = letters(tokens)
    text, _, last = await collect(
        engine, [4, 4], SamplingParams(temperature=0.0, max_tokens=40, stop=(stop,))
    )
    assert text == whole[: whole.index(stop)]
    assert last.finish_reason == "stop"
    assert last.usage.completion_tokens == whole.index(stop) + 3
    await wait_until(lambda: engine.stats().kv_tokens_used == 0)


async def test_text_held_back_for_a_stop_string_comes_at_the_end(engine, expected):
    text = letters(expected([4, 4], 8, VOCAB))
    params = SamplingParams(temperature=0.0, max_tokens=8, stop=(text[-2:] + "never",))
    assert (await collect(engine, [4, 4], params))[0] == text


async def test_an_end_token_ends_the_answer_without_text_unless_it_is_ignored(engine_of, expected):
    tokens = expected([9, 1], 12, VOCAB)
    vocabulary = Letters()
    vocabulary.eos_token_ids = frozenset([tokens[6]])
    engine = engine_of(tokenizer=vocabulary)
    end = tokens.index(tokens[6])
    params = SamplingParams(temperature=0.0, max_tokens=12)
    text, token_ids, last = await collect(engine, [9, 1], params)
    assert (text, token_ids, last.finish_reason) == (letters(tokens[:end]), tokens[:end], "stop")
    assert last.usage.completion_tokens == end + 1
    ignoring = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    text, token_ids, last = await collect(engine, [9, 1], ignoring)
    assert (text, token_ids, last.finish_reason) == (letters(tokens), tokens, "length")


async def test_logprobs_come_with_their_tokens(engine):
    params = SamplingParams(temperature=0.0, max_tokens=5, logprobs=2)
    found = []
    async for delta in engine.generate([1, 2], params):
        assert delta.logprobs is not None
        assert [entry.token_id for entry in delta.logprobs] == delta.token_ids
        found += delta.logprobs
    assert len(found) == 5
    assert all(len(entry.top) == 2 and entry.top[0] == (entry.token_id, entry.logprob) for entry in found)


async def test_a_second_turn_prefills_only_what_is_new(engine, expected):
    prompt = [(i * i) % VOCAB for i in range(300)]
    _, answer, _ = await collect(engine, prompt)
    turn = [*prompt, *answer, 1, 2, 3]
    _, token_ids, last = await collect(engine, turn)
    assert token_ids == expected(turn, 8, VOCAB)
    assert last.usage.cached_tokens == 307
    assert last.usage.prefill_tokens == len(turn) - 307
    assert engine.stats().cached_tokens == 307


async def test_namespaces_share_nothing(engine):
    prompt = [(i * i) % VOCAB for i in range(300)]
    await collect(engine, prompt, namespace="a")
    assert (await collect(engine, prompt, namespace="b"))[2].usage.cached_tokens == 0
    assert (await collect(engine, prompt, namespace="a"))[2].usage.cached_tokens == 299


async def test_generation_ends_at_the_context(engine_of, expected):
    engine = engine_of(max_context=300)
    prompt = [1] * 290
    _, token_ids, last = await collect(engine, prompt, SamplingParams(temperature=0.0))
    assert token_ids == expected(prompt, 10, VOCAB)
    assert last.finish_reason == "length"
    with pytest.raises(ContextTooLong, match=r"300 tokens, but at most 299"):
        await collect(engine, [1] * 300)


@pytest.mark.parametrize("prompt", [[], [26], [-1]])
async def test_a_prompt_outside_the_vocabulary_is_refused(engine, prompt):
    with pytest.raises(InvalidParameter, match="the prompt"):
        await collect(engine, prompt)
    with pytest.raises(InvalidParameter, match="the prompt"):
        engine.logits(prompt)


async def test_parameters_outside_the_vocabulary_are_refused(engine):
    with pytest.raises(InvalidParameter, match="logit_bias"):
        await collect(engine, [1], SamplingParams(logit_bias={VOCAB: 1.0}))


async def test_leaving_the_generator_frees_its_pages_before_the_next_step(engine_of, history_model):
    gate = Gate(history_model(VOCAB))
    engine = engine_of(gate)
    stream = engine.generate([1, 2, 3], SamplingParams(temperature=0.0))
    gate.passes.release(3)
    await anext(stream)
    calls = gate.model.num_calls
    await stream.aclose()
    gate.passes.release(10)
    await wait_until(lambda: engine.stats().in_flight == 0)
    assert engine.stats().kv_tokens_used == 0
    assert gate.model.num_calls <= max(calls, 3) + 1


async def test_a_cancelled_task_frees_its_pages(engine):
    task = asyncio.create_task(collect(engine, [1, 2, 3], SamplingParams(temperature=0.0)))
    await wait_until(lambda: engine.stats().in_flight == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await wait_until(lambda: engine.stats().in_flight == 0)
    assert engine.stats().kv_tokens_used == 0


async def test_streams_go_on_during_a_long_prefill(engine_of, expected):
    engine = engine_of(prefill_chunk=64)
    order = []

    async def read(name, prompt, num_tokens):
        async for delta in engine.generate(prompt, SamplingParams(temperature=0.0, max_tokens=num_tokens)):
            order.extend([name] * len(delta.token_ids))

    streams = [asyncio.create_task(read(name, [name], 400)) for name in range(3)]
    await wait_until(lambda: len(set(order)) == 3)
    await read("long", [(i * i) % VOCAB for i in range(2000)], 1)
    before = order[: order.index("long")]
    # 2000 tokens in chunks of 16 leave each stream more than a hundred steps.
    assert all(before.count(name) > 100 for name in range(3))
    await asyncio.gather(*streams)


async def test_a_slow_reader_gets_larger_pieces(engine, expected):
    pieces = []
    async for delta in engine.generate([1, 2], SamplingParams(temperature=0.0, max_tokens=60)):
        if not pieces:
            await wait_until(lambda: engine.stats().in_flight == 0)
        pieces.append(delta)
    assert [token_id for delta in pieces for token_id in delta.token_ids] == expected([1, 2], 60, VOCAB)
    assert len(pieces) <= 2 + len(pieces[0].token_ids)


def test_logits_are_those_of_every_token(engine, expected):
    prompt = [(i * i) % VOCAB for i in range(600)]
    logits = engine.logits(prompt)
    assert logits.shape == (600, VOCAB)
    assert logits.dtype == np.float32
    for i in (0, 255, 256, 511, 512, 599):
        assert logits[i].argmax() == expected(prompt[: i + 1], 1, VOCAB)[0]


async def test_several_event_loops_may_use_one_engine(engine, expected):
    results = {}

    def other(start):
        results[start] = asyncio.run(collect(engine, [start, 1]))[1]

    threads = [threading.Thread(target=other, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    logits = await asyncio.to_thread(engine.logits, [5, 6])
    mine = await collect(engine, [9, 1])
    for thread in threads:
        await asyncio.to_thread(thread.join, 20)
    assert results == {start: expected([start, 1], 8, VOCAB) for start in range(3)}
    assert mine[1] == expected([9, 1], 8, VOCAB)
    assert logits[1].argmax() == expected([5, 6], 1, VOCAB)[0]


def test_a_loop_that_ends_in_the_middle_of_an_answer_leaves_nothing_running(engine):
    async def abandon():
        stream = engine.generate([1, 2, 3], SamplingParams(temperature=0.0))
        await anext(stream)
        return stream

    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(abandon())
    loop.close()
    deadline = time.monotonic() + 20
    while engine.stats().in_flight and time.monotonic() < deadline:
        time.sleep(0.005)
    assert engine.stats().kv_tokens_used == 0
    with contextlib.suppress(StopIteration):
        stream.aclose().send(None)


async def test_a_device_fault_reaches_everyone_and_refuses_the_next_at_once(engine_of, history_model):
    gate = Gate(history_model(VOCAB))
    engine = engine_of(gate, max_sequences=1)
    running, queued = [
        asyncio.create_task(collect(engine, [i, 1], SamplingParams(temperature=0.0))) for i in range(2)
    ]
    gate.passes.release(3)
    await wait_until(lambda: engine.stats().in_flight == 1)
    gate.model.fail_with = RuntimeError("illegal address")
    gate.passes.release(3)
    for task in (running, queued):
        with pytest.raises(DevicePoisoned, match="RuntimeError: illegal address"):
            await task
    assert engine.stats().poisoned == "RuntimeError: illegal address"
    with pytest.raises(DevicePoisoned):
        await collect(engine, [1])
    with pytest.raises(DevicePoisoned):
        engine.logits([1])


async def test_text_before_a_fault_is_delivered(engine_of, history_model):
    model = history_model(VOCAB)
    engine = engine_of(model)
    stream = engine.generate([1, 2], SamplingParams(temperature=0.0))
    assert (await anext(stream)).token_ids
    model.fail_with = RuntimeError("gone")
    with pytest.raises(DevicePoisoned):
        [delta async for delta in stream]


async def test_closing_ends_streams_with_an_error_and_refuses_new_ones(engine_of, history_model):
    gate = Gate(history_model(VOCAB))
    engine = engine_of(gate)
    task = asyncio.create_task(collect(engine, [1, 2], SamplingParams(temperature=0.0)))
    await wait_until(lambda: engine.stats().in_flight == 1)
    closing = asyncio.create_task(asyncio.to_thread(engine.close))
    await wait_until(lambda: engine._host.is_closing)
    gate.passes.release(100)
    await closing
    with pytest.raises(ShuttingDown):
        await task
    with pytest.raises(ShuttingDown):
        await collect(engine, [1])
    with pytest.raises(ShuttingDown):
        engine.logits([1])
    engine.close()


async def test_closing_with_patience_lets_streams_finish(engine_of, history_model, expected):
    gate = Gate(history_model(VOCAB))
    engine = engine_of(gate)
    task = asyncio.create_task(collect(engine, [1, 2], SamplingParams(temperature=0.0, max_tokens=50)))
    await wait_until(lambda: engine.stats().in_flight == 1)
    closing = asyncio.create_task(asyncio.to_thread(engine.close, 20.0))
    gate.passes.release(100)
    await closing
    assert (await task)[1] == expected([1, 2], 50, VOCAB)


def test_a_model_that_cannot_be_built_leaves_no_thread(engine_of):
    def build():
        raise OutOfMemory("too large")

    before = threading.active_count()
    with pytest.raises(OutOfMemory, match="too large"):
        Engine(build, CONFIG, EngineOptions(), name="none")
    assert threading.active_count() == before


def test_a_load_that_gets_no_memory_says_so_and_is_no_fault_of_the_device(caplog):
    with pytest.raises(OutOfMemory, match="does not suffice"):
        Engine(lambda: torch.empty(2**60), CONFIG, EngineOptions(), name="none")
    assert "device_poisoned" not in caplog.text


def test_memory_that_is_promised_to_others_is_not_planned_with(engine_of):
    with pytest.raises(OutOfMemory, match="KV cache"):
        engine_of(reserved_bytes=2**60)


def test_a_cache_that_cannot_fit_is_refused_with_the_bytes(engine_of):
    with pytest.raises(OutOfMemory, match=r"needs \d+ bytes, but only \d+ bytes"):
        engine_of(kv_cache_tokens=10**15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'; expected cpu"),
        ({"kv_dtype": "int3"}, "kv_dtype is 'int3'; expected one of float32, float16, bfloat16"),
        ({"max_sequences": 0}, "max_sequences is 0; expected a positive integer"),
        ({"max_sequences": 10**6}, "max_sequences is 1000000; expected at most 1024"),
        ({"num_threads": 10**6}, "num_threads is 1000000; expected at most 1024"),
        ({"prefill_chunk": 10**6}, "prefill_chunk is 1000000; expected at most 32768"),
    ],
)
def test_wrong_options_are_named(engine_of, options, message):
    with pytest.raises(InvalidParameter, match=message):
        engine_of(**options)


def test_stats_of_an_idle_engine(engine):
    stats = engine.stats()
    assert (stats.in_flight, stats.queued, stats.kv_tokens_used) == (0, 0, 0)
    assert stats.kv_tokens_total == 4096
    assert stats.poisoned is None
