"""Text completions with echoes and logprobs: the official package and the real engine on a golden model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from helexa.engine import Engine
from helexa.engine.stream import Delta, TokenLogprob
from helexa.neuron.completion_answers import CompletionAnswers, Echo
from helexa.wire.generation import Usage
from support.scripted_engine import scripted_engine, tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
async def api(serve_engine):
    async with serve_engine(scripted_engine({"Hi": "Hello."}, template=None)) as client:
        yield client


@pytest.fixture
async def golden(serve_engine):
    """The client, and a random model with the vocabulary of bytes."""
    engine = Engine.load(GOLDEN / "qwen3.gguf", kv_dtype="float32", kv_cache_tokens=2048)
    engine.tokenizer = tokenizer()
    async with serve_engine(engine) as client:
        yield client, engine


def ask(prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": prompt, "temperature": 0, "max_tokens": 4} | fields


def expected_logprobs(engine: Engine, token_ids: list[int]) -> list[float]:
    logits = engine.logits(token_ids).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [float(logprobs[place, token_id]) for place, token_id in enumerate(token_ids[1:])]


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_an_echo_has_the_logprobs_of_the_prompt(golden, is_streamed):
    api, engine = golden
    asked = ask("cafe au", echo=True, logprobs=2)
    if is_streamed:
        chunks = [chunk.choices[0] async for chunk in await api.completions.create(**asked, stream=True)]
        text = "".join(chunk.text for chunk in chunks)
        parts = [chunk.logprobs for chunk in chunks if chunk.logprobs]
        tokens = [token for part in parts for token in part.tokens]
        found = [value for part in parts for value in part.token_logprobs]
        tops = [top for part in parts for top in part.top_logprobs or [None] * len(part.tokens)]
        offsets = [offset for part in parts for offset in part.text_offset]
    else:
        (choice,) = (await api.completions.create(**asked)).choices
        text, logprobs = choice.text, choice.logprobs
        tokens, found, tops = logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs
        offsets = logprobs.text_offset
    prompt = list(b"cafe au")
    assert text.startswith("cafe au")
    assert len(tokens) == len(found) == len(offsets) == len(prompt) + 4
    assert found[0] is None
    assert tops[0] is None
    assert found[1 : len(prompt)] == pytest.approx(expected_logprobs(engine, prompt), abs=1e-4)
    assert all(len(top) == 2 for top in tops[1 : len(prompt)])
    assert all(max(top.values()) >= value - 1e-6 for top, value in zip(tops[1:], found[1:], strict=True))
    assert tokens[:3] == ["c", "a", "f"]


def test_tokens_that_are_no_characters_are_told_apart_by_their_bytes():
    words = tokenizer()
    surplus = words.vocab_size + 3  # models may have more tokens than their vocabulary, all without a text
    top = ((0xE2, -1.0), (0x82, -2.0), (0x61, -3.0), (surplus, -4.0), (surplus + 1, -5.0))
    delta = Delta(
        "€", list(b"\xe2\x82\xac"), [TokenLogprob(token_id, -1.0, top) for token_id in b"\xe2\x82\xac"]
    )
    answers = CompletionAnswers("m", words, [Echo()])
    answers.add(0, delta)
    told = json.loads(answers.whole(Usage(1, 3, 4)))["choices"][0]["logprobs"]
    assert told["tokens"] == [r"bytes:\xe2", r"bytes:\x82", r"bytes:\xac"]
    assert told["top_logprobs"] == [{r"bytes:\xe2": -1.0, r"bytes:\x82": -2.0, "a": -3.0, "": -4.0}] * 3


async def test_a_text_is_scored_without_generating(golden):
    api, engine = golden
    answer = await api.completions.create(**ask([[5, 6, 7], [8, 9]], echo=True, logprobs=0, max_tokens=0))
    assert [len(choice.logprobs.token_logprobs) for choice in answer.choices] == [3, 2]
    assert answer.choices[0].logprobs.token_logprobs[1:] == pytest.approx(
        expected_logprobs(engine, [5, 6, 7]), abs=1e-4
    )
    assert answer.choices[0].logprobs.top_logprobs is None
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 2
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 0)


async def test_several_choices_share_the_echo(golden):
    api, _ = golden
    answer = await api.completions.create(**ask("ab", echo=True, logprobs=0, n=2, max_tokens=1))
    one, other = answer.choices
    assert one.logprobs.token_logprobs[:2] == other.logprobs.token_logprobs[:2]
    assert one.text.startswith("ab")
    assert other.text.startswith("ab")


async def test_token_ids_go_in_as_they_are(api):
    words = tokenizer()
    prompt = words.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    answer = await api.completions.create(**ask(prompt, max_tokens=50))
    assert answer.choices[0].text == "Hello."
    assert answer.usage.prompt_tokens == len(prompt)


async def test_an_answer_says_which_stop_string_ended_it(api):
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    asked = ask(prompt, stop=["xyz", "lo"], max_tokens=50)
    (choice,) = (await api.completions.create(**asked)).choices
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("Hel", "stop", "lo")
    chunks = [chunk.choices[0] async for chunk in await api.completions.create(**asked, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == "Hel"
    assert chunks[-1].stop_reason == "lo"


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_offsets_of_tokens_are_places_in_the_text_whatever_its_characters_and_stops(
    serve_engine, is_streamed
):
    async with serve_engine(scripted_engine({"Hi": "Grüße 👩‍🚀, und STOP"}, template=None)) as api:
        prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        asked = ask(prompt, echo=True, logprobs=1, stop="STOP", max_tokens=80)
        if is_streamed:
            choices = [chunk.choices[0] async for chunk in await api.completions.create(**asked, stream=True)]
        else:
            choices = (await api.completions.create(**asked)).choices
    text = "".join(choice.text for choice in choices)
    assert text == prompt + "Grüße 👩‍🚀, und "
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    assert len(tokens) == len(offsets) == len(tokenizer().encode(text))
    assert offsets == sorted(offsets)
    whole = [(token, offset) for token, offset in zip(tokens, offsets, strict=True) if token[:6] != "bytes:"]
    assert all(text.startswith(token, offset) for token, offset in whole)
    assert [text[offset] for token, offset in zip(tokens, offsets, strict=True) if token[:6] == "bytes:"] == [
        *"üüßß" + "👩" * 4 + "\u200d" * 3 + "🚀" * 4
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [100000]}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(api, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        await api.completions.create(**ask("Hi") | fields)
    assert refused.value.param == param
