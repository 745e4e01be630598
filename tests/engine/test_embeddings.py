"""Embeddings by the whole engine against the hidden states of the golden models."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from helexa.engine import Engine
from helexa.engine.collector import EmbeddingCollector
from helexa.engine.parts import pooling_of
from helexa.engine.sequence import Finished
from helexa.errors import ContextTooLong, DeviceError, InvalidParameter, UnsupportedModel
from helexa.models import config_from_gguf
from helexa.weights.gguf import open_gguf
from helexa.weights.load import GGUFWeights

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(params=["qwen3", "llama", "qwen3_yarn_tied_two_pages"])
def golden(request):
    """(path, token ids, normalised hidden states [T, D]) of a golden model."""
    path, arrays = GOLDEN / f"{request.param}.gguf", np.load(GOLDEN / f"{request.param}.npz")
    with open_gguf(path) as file:
        config = config_from_gguf(file.metadata, file.tensors)
        weight = GGUFWeights(file).vector("output_norm.weight").numpy()
    hidden = arrays["hidden"][-1].astype(np.float64)  # before the last norm
    hidden *= weight / np.sqrt(np.square(hidden).mean(-1, keepdims=True) + config.rms_norm_eps)
    return path, arrays["token_ids"].tolist(), hidden


def _unit(vector):
    return vector / np.linalg.norm(vector)


def _load(path, **options):
    return Engine.load(path, kv_dtype="float32", kv_cache_tokens=1024, max_context=1024, **options)


@pytest.mark.parametrize("prefill_chunk", [7, 512])
async def test_the_mean_and_the_last_hidden_state_are_those_of_transformers(golden, prefill_chunk):
    path, token_ids, hidden = golden
    with _load(path, prefill_chunk=prefill_chunk) as engine:
        mean, last = await engine.embed(token_ids, "mean"), await engine.embed(token_ids, "last")
        assert np.array_equal(await engine.embed(token_ids), last)
    assert mean.dtype == last.dtype == np.float32
    np.testing.assert_allclose(mean, _unit(hidden.mean(0)), atol=2e-5)
    np.testing.assert_allclose(last, _unit(hidden[-1]), atol=2e-5)
    # The two are told apart, and so is a mean that lacks its last chunk.
    assert np.abs(mean - last).max() > 1e-3
    assert np.abs(mean - _unit(hidden[:-7].mean(0))).max() > 1e-3


async def test_many_texts_at_once_and_beside_an_answer_get_the_same_vectors_as_alone():
    arrays = np.load(GOLDEN / "llama.npz")
    texts = [arrays["token_ids"][: 5 + 9 * i].tolist() for i in range(6)]
    with _load(GOLDEN / "llama.gguf", prefill_chunk=16, max_sequences=3) as engine:
        alone = [await engine.embed(text, "mean") for text in texts]

        async def talk():
            return [delta async for delta in engine.generate(texts[0]) if delta.finish_reason]

        *together, _ = await asyncio.gather(*(engine.embed(text, "mean") for text in texts), talk())
        np.testing.assert_allclose(together, alone, atol=1e-5)
        assert engine.stats().kv_tokens_used == 0


async def test_who_no_longer_waits_is_forgotten():
    with _load(GOLDEN / "llama.gguf", prefill_chunk=1) as engine:
        task = asyncio.create_task(engine.embed([5] * 1000))
        while engine.stats().in_flight == 0:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await engine.embed([1, 2, 3])).shape == (engine.config.hidden_size,)
        assert engine.stats().in_flight == 0
        assert engine.stats().poisoned is None


async def test_what_cannot_be_embedded_is_refused_by_name():
    with _load(GOLDEN / "llama.gguf") as engine:
        with pytest.raises(InvalidParameter, match="pooling is 'max'"):
            await engine.embed([1], "max")
        with pytest.raises(InvalidParameter, match="empty"):
            await engine.embed([])
        with pytest.raises(ContextTooLong):
            await engine.embed([1] * 5000)
        engine.pooling = None
        with pytest.raises(UnsupportedModel, match="'mean' or 'last'"):
            await engine.embed([1])
        assert len(await engine.embed([1], "mean")) == engine.config.hidden_size


def test_the_pooling_of_a_file_holds_where_it_is_implemented():
    kinds = [None, 0, 1, 2, 3, 4, "mean", [1]]
    assert [pooling_of(kind) for kind in kinds] == ["last", "last", "mean", None, "last", None, None, None]


def test_a_text_that_gave_way_half_computed_is_not_counted_twice():
    rows = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    collector = EmbeddingCollector("mean")
    collector.take(rows[:2], 0)
    collector.take(rows[:1], 0)
    collector.take(rows[1:], 1)
    assert collector.result().tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_hidden_states_without_a_direction_are_an_error_and_no_vector(value):
    collector = EmbeddingCollector("mean")
    collector.take(torch.full((1, 4), value), 0)
    collector.receive(Finished("stop"))
    with pytest.raises(DeviceError, match="not usable"):
        collector.future.result(0)
