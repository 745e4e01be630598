"""Whatever is sent to any route: an answer comes soon, is no fault of ours, tells errors as its API does."""

import asyncio
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.timeout(200)

PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"),
    *(
        "/v1/responses",
        "/v1/responses/resp_1",
        "/v1/responses/resp_1/input_items",
        "/v1/responses/input_tokens",
    ),
    *("/v1/messages", "/v1/messages/count_tokens", "/v1/models", "/v1/models/tiny", "/v1/models/a/b"),
    *(
        "/",
        "/health",
        "/fleet",
        "/models/load",
        "/models/unload",
        "/reload",
        "/nowhere",
        "/v1/messages/batches",
    ),
)
FIELDS = (
    *("model", "messages", "stream", "prompt", "input", "max_tokens", "system", "tools", "tool_choice", "n"),
    *(
        "stop",
        "thinking",
        "reasoning",
        "text",
        "response_format",
        "previous_response_id",
        "metadata",
        "model_id",
    ),
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
TELLING = st.sampled_from(
    ["tiny", "user", "assistant", "tool", "hi", "auto", "text", "message", "function_call"]
)
KEYS = st.sampled_from(
    ["role", "content", "type", "text", "name", "id", "arguments", "call_id", "input", "output"]
)
VALUES = st.recursive(
    SCALARS | TELLING,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
BODIES = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5).flatmap(
    lambda body: st.sampled_from([body, {**body, "model": "tiny"}])
)
RAW = BODIES.map(lambda body: json.dumps(body).encode()) | st.binary(max_size=40)


@pytest.fixture
async def site(make_site, neuron):
    return await make_site(neuron)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_any_request_is_answered(site, data):
    method = data.draw(st.sampled_from(["POST", "POST", "POST", "GET", "HEAD", "DELETE", "PUT", "OPTIONS"]))
    path = data.draw(st.sampled_from(PATHS)) + data.draw(st.sampled_from(["", "?beta=true", "?x=%ff&=&"]))
    body = data.draw(RAW) if method in ("POST", "PUT") else None
    async with asyncio.timeout(20), site.client.request(method, site.url + path, data=body) as response:
        answer = await response.read()
    assert response.status < 500, (method, path, body, answer)
    if response.status < 400 or method == "HEAD":
        return
    assert response.content_type == "application/json"
    told = json.loads(answer)
    assert told["error"]["message"]
    assert told["error"]["type"]
    assert told.get("type") == ("error" if path.startswith("/v1/messages") else None)
