"""What the gateway reads of a request, passes on and refuses."""

import asyncio
import io
import json

import pytest

from helexa.gateway.config import AuthSection, GatewayConfig
from helexa.gateway.keys import add_key

pytestmark = pytest.mark.timeout(60)

CHAT = "/v1/chat/completions"


async def post(site, body, path=CHAT, **headers):
    content = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
    async with site.client.post(site.url + path, data=content, headers=headers) as response:
        return response.status, await response.json(), response.headers


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"{", 400, "malformed_json", None),
        (b"", 400, "malformed_json", None),
        (b"\xff\xfe", 400, "malformed_json", None),
        (b"[1]", 400, "invalid_parameter", None),
        ({"messages": []}, 400, "missing_model_field", "model"),
        ({"model": None}, 400, "invalid_parameter", "model"),
        ({"model": 7}, 400, "invalid_parameter", "model"),
        ({"model": "tiny", "stream": "yes"}, 400, "invalid_parameter", "stream"),
        ({"model": "other"}, 404, "model_not_found", "model"),
    ],
)
async def test_what_the_gateway_refuses_itself(make_site, neuron, path, body, status, code, param):
    site = await make_site(neuron)
    given, answer, headers = await post(site, body, path)
    error = answer["error"]
    assert (given, error["code"], error["param"], error["type"]) == (
        status,
        code,
        param,
        "invalid_request_error",
    )
    assert headers["x-request-id"].startswith("req_")
    assert neuron.requests == []


async def test_a_body_over_the_limit_is_refused_before_and_while_it_is_read(make_site, neuron):
    site = await make_site(neuron, max_body_bytes=1000)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 2000}]}
    status, answer, _ = await post(site, body)
    assert (status, answer["error"]["code"]) == (413, "payload_too_large")

    async def chunks():
        for _ in range(20):
            yield b" " * 100

    async with site.client.post(site.url + CHAT, data=chunks()) as response:
        assert response.status == 413
    assert neuron.requests == []


async def test_an_alias_is_replaced_and_nothing_else_of_the_body_touched(make_site, neuron, catalogue):
    site = await make_site(neuron, catalogue=catalogue(small="tiny"))
    body = b'{"seed": 18446744073709551617, "model": "small", "temperature": 1e-1, "x": [ 1.50 ]}'
    assert (await post(site, body))[0] == 200
    assert neuron.requests[0] == {
        "seed": 18446744073709551617,
        "model": "tiny",
        "temperature": 0.1,
        "x": [1.5],
    }


async def test_headers_pass_both_ways_but_for_secrets_and_identities(make_site, neuron):
    site = await make_site(neuron)
    sent = {
        "authorization": "Bearer secret-key",
        "x-api-key": "secret-key",
        "cookie": "a=b",
        "x-helexa-account-id": "somebody",
        "x-request-id": "client-7",
        "x-include-thinking": "1",
        "user-agent": "editor/1",
    }
    _, _, got = await post(site, {"model": "tiny"}, **sent)
    assert got["x-request-id"] == "client-7"
    (seen,) = neuron.headers
    assert seen["x-request-id"] == "client-7"
    assert seen["x-include-thinking"] == "1"
    assert seen["user-agent"] == "editor/1"
    assert seen["accept-encoding"] == "identity"
    assert "secret" not in str(seen)
    assert not {"authorization", "x-api-key", "cookie", "x-helexa-account-id"} & set(seen)
    assert seen["x-helexa-usage"] == "comment"


@pytest.mark.parametrize("given", ["", "with space", "x" * 200, "a\tb"])
async def test_a_request_id_that_is_no_plain_word_is_replaced(make_site, neuron, given):
    site = await make_site(neuron)
    _, _, got = await post(site, {"model": "tiny"}, **{"x-request-id": given})
    assert got["x-request-id"].startswith("req_")
    assert neuron.headers[0]["x-request-id"] == got["x-request-id"]


async def test_half_characters_in_a_text_are_left_to_the_neuron(make_site, neuron):
    site = await make_site(neuron)
    status, _, _ = await post(
        site, b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud83d"}]}'
    )
    assert status == 200
    assert neuron.requests[0]["messages"][0]["content"] == "\ud83d"


async def test_half_characters_under_an_alias_are_replaced(make_site, neuron, catalogue):
    site = await make_site(neuron, catalogue=catalogue(small="tiny"))
    status, _, _ = await post(
        site, b'{"model": "small", "messages": [{"role": "user", "content": "a\\ud83d"}]}'
    )
    assert status == 200
    assert neuron.requests == [{"model": "tiny", "messages": [{"role": "user", "content": "a\ufffd"}]}]


async def test_a_body_of_megabytes_passes(make_site, neuron):
    site = await make_site(neuron)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 3_000_000}]}
    assert (await post(site, body))[0] == 200
    assert neuron.requests == [body]
    assert neuron.headers[0]["content-type"] == "application/json"


async def test_a_client_that_leaves_within_its_request_is_forgotten(make_site, neuron, eventually):
    site = await make_site(neuron)
    host, port = site.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()
    while not await site.metric("helexa_request_errors_total", code="client_closed_request"):
        await asyncio.sleep(0.02)
    assert neuron.requests == []


@pytest.mark.parametrize(
    ("body", "logged"),
    [
        ({"model": "tiny"}, {"status": 200, "model": "tiny", "node": "n0", "prompt_tokens": 7}),
        ({"model": "tiny", "stream": True}, {"status": 200, "model": "tiny", "completion_tokens": 4}),
        ({"model": "other"}, {"status": 404, "error": "model_not_found"}),
    ],
)
async def test_each_request_is_a_line_of_the_log_with_its_id(make_site, neuron, caplog, body, logged):
    caplog.set_level("INFO", "helexa.gateway.handlers")
    site = await make_site(neuron)
    async with site.client.post(site.url + CHAT, json=body, headers={"x-request-id": "mine"}) as response:
        await response.read()
    (record,) = [record for record in caplog.records if record.message == "request"]
    assert record.fields["request"] == "mine"
    assert record.fields["path"] == CHAT
    assert logged.items() <= record.fields.items()
    assert record.fields["total_ms"] >= 0


@pytest.mark.parametrize(
    ("method", "path", "status", "level"),
    [
        ("GET", "/health", 200, "DEBUG"),
        ("GET", "/v1/models/nothing", 404, "INFO"),
        ("POST", "/models/unload", 404, "INFO"),
        ("GET", "/nowhere", 404, "INFO"),
    ],
)
async def test_other_routes_have_an_id_and_a_line_of_the_log_too(
    make_site, neuron, caplog, method, path, status, level
):
    caplog.set_level("DEBUG", "helexa.gateway.handlers")
    site = await make_site(neuron)
    asked = {"json": {"model_id": "nothing"}} if method == "POST" else {}
    async with site.client.request(
        method, site.url + path, headers={"x-request-id": "mine"}, **asked
    ) as response:
        assert (response.status, response.headers.getall("x-request-id")) == (status, ["mine"])
    (record,) = [record for record in caplog.records if record.message == "request"]
    assert record.levelname == level
    assert {
        "method": method,
        "path": path,
        "request": "mine",
        "status": status,
    }.items() <= record.fields.items()
    assert "key" not in record.fields


@pytest.mark.parametrize(("name", "status"), [("keeper", 404), (None, 401)])
async def test_the_log_says_whose_key_asked_for_other_routes(
    make_site, neuron, caplog, tmp_path, name, status
):
    caplog.set_level("INFO", "helexa.gateway.handlers")
    file = tmp_path / "keys.jsonl"
    made, _ = add_key(file, "keeper", admin=True)
    config = GatewayConfig(auth=AuthSection(keys_file=str(file)))
    site = await make_site(neuron, config=config, listen="0.0.0.0:31313")
    sent = {"x-api-key": made if name else "sk-of-nobody"}
    asked = {"model_id": "nothing"}
    async with site.client.post(site.url + "/models/unload", json=asked, headers=sent) as response:
        assert response.status == status
    (record,) = [record for record in caplog.records if record.message == "request"]
    assert (record.fields["status"], record.fields.get("key")) == (status, name)
