"""The routes of the gateway before neuron stand-ins, over real sockets."""

import pytest


async def test_a_chat_goes_to_the_neuron_and_back(make_site, neuron):
    site = await make_site(neuron)
    status, body, headers = await site.chat(temperature=0)
    assert status == 200
    assert body["choices"][0]["message"]["content"] == "Once upon a time"
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"].startswith("req_")
    assert neuron.requests == [
        {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    ]


async def test_a_stream_passes_through_byte_for_byte(make_site, neuron):
    site = await make_site(neuron)
    through = await site.stream()
    body = {"model": "tiny", "messages": [], "stream": True}
    async with site.client.post(neuron.url + "/v1/chat/completions", json=body) as response:
        assert through == await response.read()
