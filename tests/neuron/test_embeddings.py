"""Embeddings: the official package and the real engine on a golden model."""

import base64
from pathlib import Path

import numpy as np
import openai
import pytest

from helexa.engine import Engine
from support.scripted_engine import tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
async def served(serve_engine):
    """The client, and a random model with the vocabulary of bytes."""
    engine = Engine.load(GOLDEN / "qwen3.gguf", kv_dtype="float32", kv_cache_tokens=1024, max_context=512)
    engine.tokenizer = tokenizer()
    async with serve_engine(engine) as client:
        yield client, engine


async def test_a_text_becomes_the_vector_that_the_engine_has_for_it(served):
    api, engine = served
    answer = await api.embeddings.create(model="m", input="Hello")
    (found,) = answer.data
    expected = await engine.embed(list(b"Hello"))
    assert found.embedding == pytest.approx(expected.tolist(), abs=1e-6)
    assert (found.index, found.object, answer.object) == (0, "embedding", "list")
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (5, 5)


async def test_inputs_keep_their_order_in_every_form(served):
    api, _ = served
    texts = (await api.embeddings.create(model="m", input=["ab", "cde"])).data
    ids = (await api.embeddings.create(model="m", input=[list(b"ab"), list(b"cde")])).data
    one = (await api.embeddings.create(model="m", input=list(b"cde"))).data
    assert [item.index for item in texts] == [0, 1]
    for left, right in ((texts[0], ids[0]), (texts[1], ids[1]), (texts[1], one[0])):
        assert left.embedding == pytest.approx(right.embedding, abs=1e-6)
    assert texts[0].embedding != pytest.approx(texts[1].embedding, abs=1e-3)


async def test_numbers_and_base64_say_the_same(served):
    api, _ = served
    asked = {"model": "m", "input": "Hello"}
    numbers = (await api.embeddings.create(**asked, encoding_format="float")).data[0].embedding
    packed = (await api.embeddings.create(**asked, encoding_format="base64")).data[0].embedding
    assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == pytest.approx(numbers)


async def test_pooling_and_dimensions_are_honoured_at_length_one(served):
    api, engine = served
    mean = await api.embeddings.create(model="m", input="Hello", extra_body={"pooling": "mean"})
    expected = await engine.embed(list(b"Hello"), "mean")
    assert mean.data[0].embedding == pytest.approx(expected.tolist(), abs=1e-6)
    short = (await api.embeddings.create(model="m", input="Hello", dimensions=3)).data[0].embedding
    assert len(short) == 3
    assert np.linalg.norm(short) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [100000]}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": "x" * 600}, "input"),
        ({"dimensions": 100000}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"extra_body": {"pooling": "max"}}, "pooling"),
        ({"extra_body": {"colour": "red"}}, "colour"),
        ({"input": ["a"] * 2049}, "input"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(served, fields, param):
    api, _ = served
    with pytest.raises(openai.BadRequestError) as refused:
        await api.embeddings.create(**{"model": "m", "input": "Hello"} | fields)
    assert refused.value.param == param
    assert param in refused.value.body["message"]


async def test_an_unknown_model_is_a_404(served):
    api, _ = served
    with pytest.raises(openai.NotFoundError):
        await api.embeddings.create(model="x", input="Hello")
