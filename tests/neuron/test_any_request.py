"""Whatever is sent to the routes of the neuron, the answer is a proper one, and never a fault of ours."""

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helexa.wire import sse
from helexa.wire.chat import ChatRequest
from helexa.wire.completions import CompletionRequest
from helexa.wire.embeddings import EmbeddingRequest
from support.request_bodies import JSON
from support.scripted_engine import scripted_engine

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMAS = st.sampled_from(
    [{}, {"type": "object"}, {"type": "array", "items": {"$ref": "#"}}, {"type": "x"}, {"$ref": "#/gone"}]
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"])},
        optional={
            "content": st.text(max_size=20) | st.none() | JSON,
            "tool_calls": JSON | st.just([{"function": {"name": "f", "arguments": "{"}}]),
            "name": st.text(max_size=4),
            "tool_call_id": st.text(max_size=4),
            "reasoning_content": st.text(max_size=9),
        },
    ),
    max_size=4,
)
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "messages": MESSAGES,
    "prompt": st.text(max_size=20) | st.lists(st.integers(0, 300), max_size=5) | st.lists(st.text()),
    "input": st.text(max_size=20) | st.lists(st.lists(st.integers(0, 300), max_size=5), max_size=3),
    "tools": st.lists(st.just(TOOL) | JSON, max_size=2),
    "tool_choice": st.sampled_from(["none", "auto", "required", {"function": {"name": "f"}}]),
    "response_format": st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "json_object", "json_schema", "regex", "grammar"])},
        optional={
            "json_schema": st.fixed_dictionaries({"schema": SCHEMAS | JSON}),
            "regex": st.text(max_size=9),
            "grammar": st.text(max_size=9) | st.just('start: "a"'),
        },
    ),
    "n": st.integers(1, 3),
    "stop": st.lists(st.text(max_size=3), max_size=3),
    "logit_bias": st.dictionaries(st.integers(0, 400).map(str), st.floats(-100, 100), max_size=3),
    "logprobs": st.booleans() | st.integers(0, 5),
    "top_logprobs": st.integers(0, 5),
    "temperature": st.floats(0, 2),
    "thinking_budget": st.integers(0, 10),
    "reasoning_effort": st.sampled_from(["none", "low", "max"]),
    "chat_template_kwargs": st.dictionaries(st.sampled_from(["enable_thinking", "tools"]), JSON, max_size=2),
    "stream": st.booleans(),
    "echo": st.booleans(),
    "seed": st.integers(-(2**63), 2**63 - 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def client(serve_engine: Any) -> Iterator[httpx.Client]:
    """A client of a neuron on a thread of its own, as hypothesis runs plain functions."""
    ready, stop, found = threading.Event(), asyncio.Event(), []

    async def serve() -> None:
        async with serve_engine(scripted_engine({}, max_context=1024)) as api:
            found.append((asyncio.get_running_loop(), str(api.base_url).removesuffix("/v1/")))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(30)
    loop, url = found[0]
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as made:
        yield made
    loop.call_soon_threadsafe(stop.set)
    thread.join(30)


def bodies(kind: type[msgspec.Struct], **required: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = [name for name in kind.__struct_fields__ if name not in ("model", "max_tokens", *required)]
    good = {name: GOOD[name] for name in names if name in GOOD}
    mostly_good = st.fixed_dictionaries(required, optional=good)
    wild = st.dictionaries(st.sampled_from(names), JSON, max_size=2)
    return st.tuples(mostly_good, st.just({}) | wild).map(
        lambda pair: {"model": "m", "max_tokens": 6} | pair[0] | pair[1]
    )


def check(response: httpx.Response) -> None:
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"]
        assert error["type"] == "invalid_request_error"
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.content.endswith(sse.DONE)
        events = [json.loads(e.data) for e in sse.Parser().feed(response.content) if e.data != "[DONE]"]
        assert not any("error" in event for event in events)
    else:
        assert response.json()["object"]


FEW = settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@FEW
@given(body=bodies(ChatRequest, messages=GOOD["messages"]))
def test_any_chat_is_answered_or_refused(client, body):
    check(client.post("/v1/chat/completions", json=body))


@FEW
@given(body=bodies(CompletionRequest, prompt=GOOD["prompt"]))
def test_any_completion_is_answered_or_refused(client, body):
    check(client.post("/v1/completions", json=body))


@FEW
@given(body=bodies(EmbeddingRequest, input=GOOD["input"]).map(lambda body: body.pop("max_tokens") and body))
def test_any_embedding_is_answered_or_refused(client, body):
    check(client.post("/v1/embeddings", json=body))


@FEW
@given(
    route=st.sampled_from(
        ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"]
    ),
    body=st.binary(max_size=30) | JSON.map(json.dumps).map(str.encode),
)
def test_any_bytes_are_refused_in_our_words(client, route, body):
    response = client.post(route, content=body)
    assert response.status_code == 400
    check(response)


@FEW
@given(
    body=st.dictionaries(st.sampled_from(["model", "prompt", "messages", "tokens", "tools"]), JSON | MESSAGES)
)
def test_any_text_is_tokenized_or_refused(client, body):
    for route in ("/tokenize", "/detokenize"):
        response = client.post(route, json={"model": "m"} | body)
        assert response.status_code < 500, response.text
