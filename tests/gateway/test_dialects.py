"""The seam that dialects plug into, with one of our own: everything in capitals."""

import json

import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from helexa.errors import InvalidParameter
from helexa.gateway.dialects import CHAT_PATH, Dialect, Dialects, Job, Refusal, openai

pytestmark = pytest.mark.timeout(60)


class Shouting:
    """A translator that shouts."""

    def feed(self, events):
        return b"".join(event + b"\n\n" for event in events.upper().split(b"\n\n") if b"CONTENT" in event)

    def keep_alive(self):
        return b"PING\n\n"

    def finish(self):
        return b"THE END\n\n"

    def failure(self, error):
        return f"FAILED {error.code}\n\n".encode()

    def whole(self, body):
        return json.loads(body)["choices"][0]["message"]["content"].upper().encode()


async def shout(asked):
    asked_for = json.loads(asked.body)
    if "word" not in asked_for:
        raise InvalidParameter("no 'word'", param="word")
    body = {"model": "small", "messages": [], "stream": asked_for.get("stream", False)}
    return Job(CHAT_PATH, "small", json.dumps(body).encode(), body["stream"], Shouting())


def refuse(error, request_id):
    return Refusal(error.status, {"content-type": "text/plain"}, f"{error.code} {request_id}".encode())


@pytest.fixture
async def make_shouting_site(make_site, catalogue, monkeypatch):
    async def hello(_):
        return PlainTextResponse("HELLO")

    shouting = Dialect(
        name="shouting",
        prefixes=("/v1/shout",),
        generating={"/v1/shout": shout},
        routes=(Route("/v1/shout/hello", hello),),
        refuse=refuse,
        id_header="shout-id",
    )
    monkeypatch.setattr("helexa.gateway.app.all_dialects", lambda _: Dialects((openai(), shouting)))

    async def make(neuron, **more):
        return await make_site(neuron, catalogue=catalogue(small="tiny"), **more)

    return make


async def shouted(site, body, method="POST", path="/v1/shout?beta=true"):
    async with site.client.request(method, site.url + path, json=body) as response:
        return response.status, await response.read(), response.headers


async def test_a_stream_goes_through_its_translator(make_shouting_site, neuron):
    site = await make_shouting_site(neuron)
    status, body, headers = await shouted(site, {"word": 1, "stream": True})
    assert status == 200
    assert headers["shout-id"] == headers["x-request-id"]
    assert body.count(b'"CONTENT"') == 4
    assert body.endswith(b"\n\nTHE END\n\n")
    assert b"data" not in body
    assert neuron.requests == [{"model": "tiny", "messages": [], "stream": True}]
    assert await site.metric("helexa_completion_tokens_total", model="tiny") == 4


async def test_a_whole_answer_goes_through_its_translator(make_shouting_site, neuron):
    site = await make_shouting_site(neuron)
    status, body, headers = await shouted(site, {"word": 1})
    assert (status, body) == (200, b"ONCE UPON A TIME")
    assert headers["content-length"] == "16"


async def test_silence_is_filled_by_the_translator(make_shouting_site, neuron, monkeypatch):
    monkeypatch.setattr("helexa.gateway.proxy.KEEP_ALIVE_S", 0.05)
    neuron.first_word_s = 0.2
    site = await make_shouting_site(neuron)
    _, body, _ = await shouted(site, {"word": 1, "stream": True})
    assert body.startswith(b"PING\n\n")
    assert body.endswith(b"THE END\n\n")


async def test_a_stream_that_breaks_off_is_ended_by_the_translator(make_shouting_site, make_neuron):
    site = await make_shouting_site(make_neuron("tiny", half_after=2))
    _, body, _ = await shouted(site, {"word": 1, "stream": True})
    assert body.count(b"CONTENT") == 2
    assert body.endswith(b"\n\nFAILED upstream_connection_error\n\n")


async def test_a_refusal_of_the_neuron_within_silence_is_told_by_the_translator(
    make_shouting_site, make_neuron, monkeypatch
):
    monkeypatch.setattr("helexa.gateway.proxy.KEEP_ALIVE_S", 0.01)
    neuron = make_neuron(
        "tiny", refusal=(400, {"message": "too long", "code": "context_length_exceeded"}, {})
    )
    neuron.refusal_s = 0.1
    site = await make_shouting_site(neuron)
    status, body, _ = await shouted(site, {"word": 1, "stream": True})
    assert (status, body[-32:]) == (200, b"FAILED context_length_exceeded\n\n")
    assert b"PING" in body


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_of_the_neuron_is_told_in_the_dialect(make_shouting_site, make_neuron, stream):
    neuron = make_neuron("tiny", refusal=(429, {"message": "full", "code": "rate_limit_exceeded"}, {}))
    site = await make_shouting_site(neuron)
    status, body, _ = await shouted(site, {"word": 1, "stream": stream})
    assert status == 429
    assert body.startswith(b"rate_limit_exceeded req_")


@pytest.mark.parametrize(
    ("method", "path", "body", "said"),
    [
        ("POST", "/v1/shout", {}, (400, "invalid_parameter")),
        ("POST", "/v1/shout", {"word": "x" * 2000}, (413, "payload_too_large")),
        ("GET", "/v1/shout", None, (405, "method_not_allowed")),
        ("DELETE", "/v1/shout/hello", None, (405, "method_not_allowed")),
        ("GET", "/v1/shout/nowhere", None, (404, "not_found")),
    ],
)
async def test_every_failure_below_a_dialects_path_is_in_its_words(
    make_shouting_site, neuron, method, path, body, said
):
    site = await make_shouting_site(neuron, max_body_bytes=1000)
    status, text, _ = await shouted(site, body, method, path)
    assert (status, text.decode().split(" req_")[0]) == said


async def test_other_paths_keep_the_envelope_of_openai(make_shouting_site, neuron):
    site = await make_shouting_site(neuron)
    status, text, _ = await shouted(site, None, "GET", "/v1/shouting")
    assert (status, json.loads(text)["error"]["code"]) == (404, "not_found")


async def test_a_dialect_may_have_routes_of_its_own(make_shouting_site, neuron):
    site = await make_shouting_site(neuron)
    assert (await shouted(site, None, "GET", "/v1/shout/hello"))[1] == b"HELLO"


@pytest.mark.parametrize("path", ["/v1/embeddings", "/tokenize", "/detokenize"])
async def test_the_neurons_other_routes_pass_through(make_site, neuron, path):
    site = await make_site(neuron)
    async with site.client.post(
        site.url + path + "?beta=true", json={"model": "tiny", "input": "a"}
    ) as response:
        assert response.status == 200
        assert response.headers["x-request-id"]
    assert neuron.requests == [{"model": "tiny", "input": "a"}]
