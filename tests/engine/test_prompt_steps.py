"""Short chunks of prompts, padded to few sizes and captured."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from helexa.engine import Engine, SamplingParams
from helexa.engine.pages import SCRATCH_PAGE
from helexa.engine.prompt_steps import FEWEST_TOKENS, MOST_TOKENS, PromptSteps, size_of
from helexa.engine.sequence import Sequence
from helexa.ops.tensor import EMULATED

pytestmark = pytest.mark.cuda

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["qwen3", "qwen3moe", "qwen3next", "qwen35_tied", "qwen35moe"]
OFFSET = 260  # of the tokens in their sequence


@pytest.fixture(params=CASES)
def engine(request, cuda_device):
    sizes = {"kv_dtype": "bfloat16", "kv_cache_tokens": 2048, "prefix_cache": False, "device": cuda_device}
    with Engine.load(GOLDEN / f"{request.param}.gguf", num_threads=1, **sizes) as engine:
        yield engine


def on_device(engine, work):
    """What `work` returns on the device thread once its kernels have ended; tests use another stream."""

    def whole():
        found = work()
        if not EMULATED:
            torch.cuda.synchronize()
        return found

    return engine._host.worker.call(whole).result()


def chunk(engine, num_tokens, start, pages=(3, 5), slot=2):
    """A sequence the next tokens of which are the chunk, and whose past is there."""
    generator = np.random.default_rng(num_tokens)
    sequence = Sequence(generator.integers(engine.config.vocab_size, size=start + num_tokens).tolist(), 1000)
    sequence.pages, sequence.slot = list(pages), slot
    runner = engine._host.core.runner
    for first in range(0, start, 256):
        sequence.num_computed = first
        runner._prefill_logits(sequence, min(256, start - first))
    sequence.num_computed = start
    return sequence


def caches(engine):
    runner = engine._host.core.runner
    pages = [layer.clone() for layer in (*runner.cache.k, *runner.cache.v)]
    return pages, [layer.clone() for layer in (*runner.states.conv, *runner.states.recurrent)]


@pytest.mark.parametrize(("num_tokens", "start"), [(FEWEST_TOKENS, 0), (32, OFFSET), (65, OFFSET), (258, 0)])
def test_a_padded_chunk_gives_what_it_gives_alone(engine, num_tokens, start):
    def both():
        runner = engine._host.core.runner
        alone, _ = runner._prefill_logits(chunk(engine, num_tokens, start), num_tokens)
        padded, slots, positions = runner._prompts.logits(chunk(engine, num_tokens, start), num_tokens)
        assert (slots.tolist(), positions.tolist()) == ([2], [start + num_tokens - 1])
        return alone.clone(), padded.clone()

    alone, padded = on_device(engine, both)
    assert padded.shape == alone.shape == (1, engine.config.vocab_size)
    assert torch.isfinite(padded).all()
    assert float((padded - alone).std() / alone.std()) < 0.02
    wrong = alone.roll(1)
    assert float((padded - wrong).std() / alone.std()) > 0.5


@pytest.mark.parametrize("num_tokens", [FEWEST_TOKENS, 32])
def test_padding_leaves_what_belongs_to_others(engine, num_tokens):
    def run():
        runner = engine._host.core.runner
        for layer in (*runner.cache.k, *runner.cache.v, *runner.states.conv, *runner.states.recurrent):
            layer.normal_()
        sequence = chunk(engine, num_tokens, OFFSET)
        before = caches(engine)
        runner._prompts.logits(sequence, num_tokens)
        return before, caches(engine)

    (pages, states), (pages_after, states_after) = on_device(engine, run)
    for old, new in zip(pages, pages_after, strict=True):
        written = {5}  # where the tokens from OFFSET on lie
        if size_of(num_tokens) > num_tokens:
            written.add(SCRATCH_PAGE)
        changed = {page for page in range(len(old)) if not torch.equal(old[page], new[page])}
        assert changed == written
        first = OFFSET % 256
        assert torch.equal(old[5, :, :first], new[5, :, :first])
        assert torch.equal(old[5, :, first + num_tokens :], new[5, :, first + num_tokens :])
    for old, new in zip(states, states_after, strict=True):
        changed = {slot for slot in range(len(old)) if not torch.equal(old[slot], new[slot])}
        assert changed - {0} == {2}


@pytest.mark.parametrize("num_tokens", [60, 300])
async def test_a_prompt_gives_the_same_when_it_comes_again(engine, num_tokens):
    """At first launch by launch; then captured, and replayed."""
    if EMULATED and num_tokens > 256:
        pytest.skip("on the host nothing is captured")
    prompt = np.random.default_rng(1).integers(engine.config.vocab_size, size=num_tokens).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=2)
    found = []
    for _ in range(3):
        deltas = [delta async for delta in engine.generate(prompt, params)]
        found.append([token for delta in deltas for token in delta.logprobs])
    assert found[0] == found[1] == found[2]
    if not EMULATED:
        steps = engine._host.core.runner._prompts
        await asyncio.to_thread(on_device, engine, lambda: None)
        assert list(steps._graphs) == [size_of(num_tokens)]


def test_sizes_are_few_and_little_larger_than_chunks():
    sizes = {size_of(num_tokens) for num_tokens in range(FEWEST_TOKENS, MOST_TOKENS + 1)}
    assert len(sizes) == 12
    assert max(sizes) == MOST_TOKENS
    assert [size_of(count) for count in (17, 32, 33, 256, 257, 320, 321)] == [32, 32, 64, 256, 320, 320, 384]


def test_chunks_whose_rows_are_read_and_few_or_many_tokens_are_computed_elsewhere():
    sequence = Sequence([0] * 100, 200)
    assert PromptSteps.serve(sequence, FEWEST_TOKENS)
    assert PromptSteps.serve(sequence, MOST_TOKENS)
    assert not PromptSteps.serve(sequence, FEWEST_TOKENS - 1)
    assert not PromptSteps.serve(sequence, MOST_TOKENS + 1)
    sequence.rows = object()
    assert not PromptSteps.serve(sequence, FEWEST_TOKENS)
