"""Servers of kind openai: what they are asked, and how they stand in the fleet beside neurons."""

import json

import pytest

from helexa.gateway import foreign
from helexa.gateway.catalogue import ModelEntry

pytestmark = pytest.mark.timeout(60)

KEY = "sk-of-the-gateway"


@pytest.fixture
def server(make_neuron):
    """Another server that has `big`."""
    return make_neuron("big", entry={"kind": "openai", "key": KEY})


def test_extensions_are_taken_out_and_all_else_is_kept_byte_for_byte():
    body = b'{"model": "m", "thinking_budget": 5, "temperature": 1e-1, "seed": 18446744073709551617}'
    assert foreign.request_body(body, is_stream=False) == (
        b'{"model":"m","temperature":1e-1,"seed":18446744073709551617}',
        False,
    )
    assert foreign.request_body(b'{"model": "m"}', is_stream=False) == (b'{"model": "m"}', False)


@pytest.mark.parametrize("options", [None, "null", "{}", '{"include_usage": false}', "7"])
def test_a_stream_is_asked_for_its_usage(options):
    given = f', "stream_options": {options}' if options else ""
    body, is_ours = foreign.request_body(f'{{"model": "m"{given}}}'.encode(), is_stream=True)
    assert is_ours
    assert json.loads(body)["stream_options"] == {"include_usage": True}


def test_a_usage_that_the_client_wants_is_not_hidden():
    body = b'{"stream_options": {"include_usage": true}}'
    assert foreign.request_body(body, is_stream=True) == (body, False)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_only_events_that_tell_nothing_but_the_usage_are_hidden(newline):
    word = b'data: {"choices": [{"delta": {"content": "the \\"usage\\" of"}}], "usage": null}'
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 7}}'
    both = b'data: {"choices": [{"delta": {}}], "usage": {"prompt_tokens": 7}}'
    done = b"data: [DONE]"
    end = newline * 2
    events = [word, usage, both, b': "usage"', b'data: {"usage"', done]
    kept = [word, both, b': "usage"', b'data: {"usage"', done]
    assert foreign.without_usage(end.join(events) + end) == end.join(kept) + end


async def test_its_models_are_listed_and_served(make_site, server, neuron):
    site = await make_site(server, neuron)
    cards = {card["id"]: card for card in (await site.get("/v1/models"))["data"]}
    assert set(cards) == {"big", "tiny"}
    assert cards["big"]["loaded"]
    assert cards["big"]["limit"] == {"context": 99}
    status, body, _ = await site.chat("big")
    assert (status, body["choices"][0]["message"]["content"]) == (200, "Once upon a time")
    assert await site.metric("helexa_prompt_tokens_total", model="big", node="n0") == 7


async def test_it_learns_our_key_and_nothing_of_the_client(make_site, server):
    site = await make_site(server)
    sent = {"authorization": "Bearer clients-own", "cookie": "a=b", "x-secret": "s", "x-request-id": "r-1"}
    body = {"model": "big", "messages": []}
    async with site.client.post(site.url + "/v1/chat/completions", json=body, headers=sent) as response:
        assert response.status == 200
    (seen,) = server.headers
    assert seen["authorization"] == f"Bearer {KEY}"
    assert seen["x-request-id"] == "r-1"
    assert not {name for name in seen if name.startswith("x-helexa")} | ({"cookie", "x-secret"} & set(seen))


async def test_half_characters_are_replaced_for_it(make_site, server):
    site = await make_site(server)
    body = b'{"model": "big", "stream": true, "messages": [{"role": "user", "content": "a\\ud83d"}]}'
    async with site.client.post(site.url + "/v1/chat/completions", data=body) as response:
        assert (await response.read()).endswith(b"data: [DONE]\n\n")
    assert server.requests[0]["messages"] == [{"role": "user", "content": "a\ufffd"}]


async def test_a_stream_is_metered_exactly_and_looks_as_the_client_asked(make_site, server):
    site = await make_site(server)
    text = await site.stream("big")
    assert server.requests[-1]["stream_options"] == {"include_usage": True}
    assert b"usage" not in text
    assert text.endswith(b"data: [DONE]\n\n")
    assert await site.metric("helexa_cached_prompt_tokens_total", model="big") == 3
    assert b'"usage"' in await site.stream("big", stream_options={"include_usage": True})


async def test_only_the_models_that_the_configuration_names_are_used(make_site, make_neuron):
    entry = {"kind": "openai", "models": ("big", "gone")}
    site = await make_site(make_neuron("big", "other", entry=entry))
    assert [card["id"] for card in (await site.get("/v1/models"))["data"]] == ["big"]
    assert (await site.chat("other"))[0] == 404


async def test_a_server_that_cannot_list_models_has_those_that_are_configured(make_site, make_neuron):
    entry = {"kind": "openai", "models": ("big",)}
    site = await make_site(make_neuron("big", entry=entry, list_status=404))
    assert (await site.chat("big"))[0] == 200


async def test_a_server_whose_list_fails_is_not_up(make_site, make_neuron):
    site = await make_site(make_neuron("big", entry={"kind": "openai"}, list_status=500))
    assert (await site.chat("big"))[0] == 503


@pytest.mark.parametrize(
    ("status", "words"), [(401, "does not accept the key"), (302, "endpoint may be wrong")]
)
async def test_trouble_between_us_and_it_is_not_the_clients(make_site, make_neuron, status, words):
    entry = {"kind": "openai", "key": KEY}
    server = make_neuron("big", entry=entry, refusal=(status, {"message": "no"}, {"location": "/x"}))
    site = await make_site(server)
    given, body, headers = await site.chat("big")
    assert (given, body["error"]["code"]) == (502, "upstream_error")
    assert words in body["error"]["message"]
    assert KEY not in str(body)
    assert "location" not in headers


async def test_another_replica_serves_when_it_refuses_our_key(make_site, make_neuron):
    entry = {"kind": "openai", "key": KEY}
    bad = make_neuron("big", entry=entry, refusal=(401, {"message": "no"}, {}))
    good = make_neuron("big")
    site = await make_site(bad, good)
    assert (await site.chat("big"))[0] == 200
    assert (len(bad.requests), len(good.requests)) == (1, 1)


async def test_its_other_refusals_come_in_our_envelope_with_retry_after(make_site, make_neuron):
    refusal = (
        429,
        {"message": "slow down", "type": "rate_limit_error"},
        {"retry-after": "7", "x-theirs": "1"},
    )
    site = await make_site(make_neuron("big", entry={"kind": "openai"}, refusal=refusal))
    status, body, headers = await site.chat("big")
    assert (status, headers["retry-after"]) == (429, "7")
    assert (body["error"]["message"], body["error"]["type"]) == ("slow down", "rate_limit_error")
    assert "x-theirs" not in headers


async def test_nothing_is_loaded_on_it(make_site, server, catalogue):
    site = await make_site(server, catalogue=catalogue(ModelEntry("cold")))
    status, body, _ = await site.chat("cold")
    assert (status, body["error"]["code"]) == (404, "service_unavailable")
    assert server.loads == []
