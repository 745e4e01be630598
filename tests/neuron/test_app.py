"""The control routes, and what every route does with wrong requests."""

import asyncio
import threading

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helexa import __version__
from helexa.errors import InvalidFile


async def test_the_front_door_answers_get_and_head(client):
    assert (await client.get("/")).json() == {"name": "helexa-neuron", "version": __version__}
    assert (await client.head("/")).status_code == 200


async def test_version_and_discovery_describe_the_host(client):
    assert (await client.get("/version")).json()["version"] == __version__
    found = (await client.get("/discovery")).json()
    assert found["cpu"]["threads"] >= 1
    assert found["cpu"]["memory_total_bytes"] > 2**20
    assert isinstance(found["devices"], list)


async def test_health_shows_models_and_activation(client):
    health = (await client.get("/health")).json()
    assert health["status"] == "ok"
    assert health["activation"] == {"state": "ready", "completed": ["m"]}
    assert health["models"][0]["max_in_flight"] == 2
    assert health["memory_available_bytes"] > 0


async def test_models_are_listed_for_gateways_and_for_openai_clients(client):
    (info,) = (await client.get("/models")).json()
    assert info["id"] == "m"
    assert info["status"] == "loaded"
    assert info["limit"] == {"context": 200}
    listing = (await client.get("/v1/models")).json()
    assert listing["object"] == "list"
    assert listing["data"][0]["max_model_len"] == 200
    assert (await client.get("/v1/models/m")).json()["id"] == "m"
    assert (await client.get("/v1/models/x")).status_code == 404


async def test_everything_answers_while_a_model_loads(make_neuron, serve_neuron, script, eventually):
    script.load_hold = threading.Event()
    neuron = make_neuron("m")
    async with serve_neuron(neuron) as client:
        await eventually(lambda: script.loads)
        health = (await client.get("/health")).json()
        assert health["activation"] == {"state": "pre_warming", "in_progress": "m"}
        (info,) = (await client.get("/models")).json()
        assert info["status"] == "loading"
        assert info["progress"]["phase"] == "weights"
        script.load_hold.set()
        await eventually(lambda: neuron.registry.activation().state == "ready")


async def test_a_load_is_asynchronous_single_and_repeatable(client, script):
    script.load_hold = threading.Event()
    first = await client.post("/models/load", json={"model_id": "n", "options": {"max_context": 64}})
    assert first.status_code == 202
    assert first.json()["status"] == "loading"
    joined = asyncio.create_task(client.post("/models/load", json={"model_id": "n", "wait": True}))
    await asyncio.sleep(0.05)
    script.load_hold.set()
    assert (await joined).json()["status"] == "loaded"
    again = await client.post("/models/load", json={"model_id": "n"})
    assert again.status_code == 200
    assert [loads for loads in script.loads if loads[0] == "/models/n"] == [
        ("/models/n", {"device": "auto", "max_context": 64})
    ]


async def test_a_failed_load_keeps_its_error_until_it_is_loaded_again(client, script):
    script.load_error = InvalidFile("the file is cut short")
    response = await client.post("/models/load", json={"model_id": "n", "wait": True})
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "invalid_model_file"
    info = next(model for model in (await client.get("/models")).json() if model["id"] == "n")
    assert info["status"] == "failed"
    assert info["error"]["message"] == "the file is cut short"
    body = {"model": "n", "messages": [{"role": "user", "content": "x"}]}
    refused = await client.post("/v1/chat/completions", json=body)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "model_load_failed"
    script.load_error = None
    response = await client.post("/models/load", json={"model_id": "n", "wait": True})
    assert response.json()["status"] == "loaded"


async def test_a_source_that_does_not_exist_fails_the_load(client):
    response = await client.post("/models/load", json={"model_id": "n", "source": "nowhere", "wait": True})
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "repo_fetch_failed"


async def test_unloading_frees_the_engine_and_forgets_the_model(client, script):
    response = await client.post("/models/unload", json={"model_id": "m"})
    assert response.json() == {"model_id": "m", "status": "unloaded"}
    assert script.engines[0].is_closed
    assert (await client.get("/models")).json() == [{"id": "m", "status": "unloaded", "source": "m"}]
    assert (await client.post("/models/unload", json={"model_id": "m"})).status_code == 404


async def test_a_poisoned_model_is_degraded_refused_and_reloadable(client, script):
    script.poisoned = "a kernel failed"
    assert (await client.get("/health")).json()["status"] == "degraded"
    assert (await client.get("/models")).json()[0]["status"] == "poisoned"
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    assert (await client.post("/v1/chat/completions", json=body)).json()["error"]["code"] == "device_poisoned"
    loading = asyncio.create_task(client.post("/models/load", json={"model_id": "m", "wait": True}))
    await asyncio.sleep(0)
    script.poisoned = None
    await loading
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200


async def test_metrics_count_requests_tokens_and_loads(client):
    await client.post(
        "/v1/chat/completions", json={"model": "m", "messages": [{"role": "user", "content": "x"}]}
    )
    await client.post(
        "/v1/chat/completions", json={"model": "x", "messages": [{"role": "user", "content": "x"}]}
    )
    text = (await client.get("/metrics")).text
    for line in (
        'helexa_neuron_requests_total{model="m",route="chat"} 1.0',
        'helexa_neuron_request_errors_total{code="model_not_found",model=""} 1.0',
        'helexa_neuron_completion_tokens_total{model="m"} 6.0',
        'helexa_neuron_cached_prompt_tokens_total{model="m"} 3.0',
        'helexa_neuron_time_to_first_token_seconds_count{model="m"} 1.0',
        'helexa_neuron_inter_token_seconds_count{model="m"} 5.0',
        'helexa_neuron_model_loads_total{model="m",result="ok"} 1.0',
        'helexa_neuron_model_queue_depth{model="m"} 0.0',
        'helexa_neuron_rejections_total{model="m",reason="queue_full"} 0.0',
    ):
        assert line in text


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("GET", "/nowhere", b"", 404, "not_found"),
        ("DELETE", "/v1/chat/completions", b"", 405, "method_not_allowed"),
        ("POST", "/v1/chat/completions", b"{", 400, "malformed_json"),
        ("POST", "/v1/chat/completions", b"\xff", 400, "malformed_json"),
        ("POST", "/v1/chat/completions", b"[]", 400, "invalid_parameter"),
        ("POST", "/v1/chat/completions", b"{}", 400, "missing_model_field"),
        ("POST", "/v1/chat/completions", b'{"model": ""}', 400, "invalid_parameter"),
        ("POST", "/models/load", b'{"model_id": ""}', 400, "invalid_request"),
        ("POST", "/models/load", b'{"model_id": "a", "optons": {}}', 400, "invalid_parameter"),
        ("POST", "/v1/completions", b" " * 5000, 413, "payload_too_large"),
    ],
)
async def test_wrong_requests_get_the_envelope(
    make_neuron, serve_neuron, method, path, content, status, code
):
    async with serve_neuron(make_neuron(max_body_bytes=4096)) as client:
        response = await client.request(method, path, content=content, headers={"content-type": "text/plain"})
        assert response.status_code == status
        assert response.json()["error"]["code"] == code
        assert set(response.json()["error"]) >= {"message", "type", "code", "param"}


async def test_a_body_without_a_declared_length_has_a_limit_too(make_neuron, serve_neuron):
    async def chunks():
        for _ in range(10):
            yield b" " * 1000

    async with serve_neuron(make_neuron(max_body_bytes=4096)) as client:
        assert (await client.post("/v1/completions", content=chunks())).status_code == 413


async def test_a_request_id_is_returned_or_made_up(client):
    assert (await client.get("/", headers={"x-request-id": "abc"})).headers["x-request-id"] == "abc"
    assert len((await client.get("/health")).headers["x-request-id"]) == 32


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["messages", "prompt", "n", "stop", "logit_bias", "stream", "tools", "seed", "logprobs", "metadata",
     "chat_template_kwargs", "max_tokens", "response_format", "tool_choice", "stream_options", "model_id",
     "options", "top_k"]
)  # fmt: skip
BODIES = JSON | st.dictionaries(FIELDS, JSON, max_size=4).map(lambda body: {"model": "m"} | body)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=BODIES,
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/models/load", "/models/unload"]),
)
def test_no_json_makes_a_5xx(make_neuron, body, path):
    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(make_neuron().app)
        async with httpx.AsyncClient(transport=transport, base_url="http://neuron") as client:
            return await client.post(path, json=body)

    response = asyncio.run(post())
    assert response.status_code < 500
    if response.status_code >= 400:
        assert response.json()["error"]["message"]
