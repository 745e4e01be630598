"""Streams, replicas and faults on the way between client and neuron."""

import asyncio
import json
import signal
import sys
from pathlib import Path

import aiohttp
import pytest

pytestmark = pytest.mark.timeout(60)


def events(text):
    return [line[6:] for line in text.split(b"\n\n") if line.startswith(b"data: ")]


def words(text):
    chunks = [json.loads(event) for event in events(text) if event != b"[DONE]"]
    return [
        choice["delta"]["content"]
        for chunk in chunks
        for choice in chunk.get("choices", ())
        if choice["delta"].get("content")
    ]


def assert_ends_with_an_error(text, said, code):
    *_, error, finish, done = events(text)
    assert done == b"[DONE]"
    assert json.loads(error)["error"]["code"] == code
    assert json.loads(error)["error"]["type"] == "api_error"
    last = json.loads(finish)
    assert last["choices"][0]["finish_reason"] == "error"
    assert last["object"] == "chat.completion.chunk"
    assert last["id"] == "gen-1"
    assert words(text) == said


async def test_each_event_is_passed_on_when_it_comes(make_site, make_neuron):
    neuron = make_neuron("tiny", pause_s=0.2)
    site = await make_site(neuron)
    body = {"model": "tiny", "messages": [], "stream": True}
    loop = asyncio.get_running_loop()
    async with site.client.post(site.url + "/v1/chat/completions", json=body) as response:
        arrivals = []
        while chunk := await response.content.readany():
            arrivals += [loop.time()] * chunk.count(b'"content"')
    assert len(arrivals) == 4
    assert arrivals[-1] - arrivals[0] > 0.4


async def test_half_an_answer_ends_with_an_error_a_finish_and_done(make_site, make_neuron):
    site = await make_site(make_neuron("tiny", half_after=2))
    text = await site.stream()
    assert_ends_with_an_error(text, ["Once", " upon"], "upstream_connection_error")
    assert (
        await site.metric("helexa_request_errors_total", model="tiny", code="upstream_connection_error") == 1
    )


async def test_a_completion_ends_with_an_error_in_its_own_form(make_site, make_neuron):
    site = await make_site(make_neuron("tiny", half_after=2))
    body = {"model": "tiny", "prompt": "hi", "stream": True}
    async with site.client.post(site.url + "/v1/completions", json=body) as response:
        *_, error, finish, done = events(await response.read())
    assert done == b"[DONE]"
    assert json.loads(error)["error"]["code"] == "upstream_connection_error"
    assert json.loads(finish)["object"] == "text_completion"
    assert json.loads(finish)["choices"] == [
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "error"}
    ]


NEURON = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from conftest import FakeNeuron, listening

async def main():
    neuron = FakeNeuron(name="real", words=[f" {i}" for i in range(1000)], pause_s=0.02)
    neuron.hold("tiny")
    async with listening(neuron) as url:
        print(url, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
async def neuron_process():
    """A neuron stand-in in a process of its own, that dribbles a thousand words: process and URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", NEURON, str(Path(__file__).parent), stdout=asyncio.subprocess.PIPE
    )
    url = (await process.stdout.readline()).decode().strip()
    yield process, url
    if process.returncode is None:
        process.kill()
    await process.wait()


async def test_a_neuron_killed_mid_stream_ends_the_stream_with_an_error(
    make_site, neuron_process, eventually
):
    process, url = neuron_process
    site = await make_site(endpoints=(url,))
    body = {"model": "tiny", "messages": [], "stream": True}
    async with site.client.post(site.url + "/v1/chat/completions", json=body) as response:
        text = await response.content.readany()
        while text.count(b"data: ") < 5:
            text += await response.content.readany()
        process.send_signal(signal.SIGKILL)
        text += await response.read()
    said = words(text)
    assert_ends_with_an_error(text, [f" {i}" for i in range(len(said))], "upstream_connection_error")
    node = site.gateway.fleet.nodes["x0"]
    await eventually(lambda: not node.routable)
    assert node.active["tiny"] == 0
    assert (await site.chat())[0] == 503


async def test_a_neuron_killed_before_its_answer_is_502_and_then_503(make_site, neuron_process, eventually):
    process, url = neuron_process
    site = await make_site(endpoints=(url,), poll_interval_s=60)
    request = asyncio.create_task(site.chat())
    await eventually(lambda: site.gateway.fleet.nodes["x0"].active["tiny"])
    await asyncio.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    status, body, _ = await request
    assert (status, body["error"]["code"], body["error"]["type"]) == (
        502,
        "upstream_connection_error",
        "api_error",
    )
    status, body, headers = await site.chat()
    assert (status, body["error"]["code"]) == (503, "service_unavailable")
    assert headers["retry-after"] in ("3", "5")


async def test_a_frozen_neuron_ends_the_stream_after_the_idle_timeout(make_site, neuron_process):
    process, url = neuron_process
    site = await make_site(endpoints=(url,), idle_timeout_s=0.3)
    body = {"model": "tiny", "messages": [], "stream": True}
    async with site.client.post(site.url + "/v1/chat/completions", json=body) as response:
        text = await response.content.readany()
        process.send_signal(signal.SIGSTOP)
        text += await response.read()
    assert_ends_with_an_error(text, words(text), "upstream_timeout")


async def test_a_neuron_that_is_down_is_skipped(make_site, neuron, neuron_process):
    process, url = neuron_process
    site = await make_site(neuron, endpoints=(url,), poll_interval_s=60)
    site.gateway.fleet.nodes["n0"].active["tiny"] += 1  # so that the other is preferred
    process.send_signal(signal.SIGKILL)
    await process.wait()
    assert (await site.chat())[0] == 200
    assert not site.gateway.fleet.nodes["x0"].routable
    assert len(neuron.requests) == 1


async def test_an_error_event_of_the_neuron_passes_and_is_counted_by_its_code(make_site, neuron, monkeypatch):
    events_sent = (
        b'data: {"error":{"message":"m","type":"api_error","code":"device_poisoned"}}\n\ndata: [DONE]\n\n'
    )

    async def fail(self, path, asked, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": events_sent})

    monkeypatch.setattr(type(neuron), "_answer", fail)
    site = await make_site(neuron)
    assert await site.stream() == events_sent
    assert await site.metric("helexa_request_errors_total", model="tiny", code="device_poisoned") == 1


async def test_a_slow_reader_gets_everything_and_holds_little_up_in_the_gateway(make_site, make_neuron):
    neuron = make_neuron("tiny", words=["word" * 10_000] * 1000)
    site = await make_site(neuron)
    body = {"model": "tiny", "messages": [], "stream": True}
    async with site.client.post(site.url + "/v1/chat/completions", json=body) as response:
        await asyncio.sleep(0.5)
        assert neuron.running == 1, "forty megabytes were taken in although nobody reads"
        text = await response.read()
    assert len(words(text)) == 1000


async def test_a_neuron_that_takes_too_long_is_not_asked_twice(make_site, make_neuron):
    neurons = [make_neuron("tiny", first_word_s=30) for _ in range(2)]
    site = await make_site(*neurons, response_timeout_s=0.2)
    status, body, _ = await site.chat()
    assert (status, body["error"]["code"]) == (504, "upstream_timeout")
    assert [len(neuron.requests) for neuron in neurons] == [1, 0]


async def test_a_client_that_leaves_cancels_the_generation(make_site, make_neuron, eventually):
    neuron = make_neuron("tiny", words=["word"] * 1000, pause_s=0.02)
    site = await make_site(neuron)
    body = {"model": "tiny", "messages": [], "stream": True}
    async with site.client.post(site.url + "/v1/chat/completions", json=body) as response:
        await response.content.readany()
        response.close()
    await eventually(lambda: neuron.cancelled == 1)
    node = site.gateway.fleet.nodes["n0"]
    await eventually(lambda: node.active["tiny"] == 0)
    assert await site.metric("helexa_request_errors_total", model="tiny", code="client_closed_request") == 1


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_client_that_leaves_before_the_first_byte_cancels_too(
    make_site, make_neuron, eventually, streamed
):
    neuron = make_neuron("tiny", first_word_s=60)
    site = await make_site(neuron)
    request = asyncio.create_task(site.stream() if streamed else site.chat())
    await eventually(lambda: neuron.running)
    request.cancel()
    await eventually(lambda: neuron.cancelled == 1)
    await eventually(lambda: site.gateway.fleet.nodes["n0"].active["tiny"] == 0)


async def test_a_stream_hears_keep_alives_until_its_first_byte(make_site, make_neuron, monkeypatch):
    monkeypatch.setattr("helexa.gateway.proxy.KEEP_ALIVE_S", 0.05)
    site = await make_site(make_neuron("tiny", first_word_s=0.3))
    text = await site.stream()
    assert text.startswith(b": keep-alive\n\n")
    assert words(text) == ["Once", " upon", " a", " time"]


async def test_two_replicas_share_the_load(make_site, make_neuron):
    neurons = [make_neuron("tiny", pause_s=0.02) for _ in range(2)]
    site = await make_site(*neurons)
    await asyncio.gather(*(site.stream() for _ in range(20)))
    assert [len(neuron.requests) for neuron in neurons] == [10, 10]


@pytest.mark.parametrize("code", ["shutting_down", "rate_limit_exceeded"])
async def test_a_replica_that_refuses_for_now_is_replaced_by_another(make_site, make_neuron, code):
    bad = make_neuron("tiny", refusal=(503, {"message": "not now", "code": code}, {"retry-after": "9"}))
    good = make_neuron("tiny")
    site = await make_site(bad, good)
    assert (await site.chat())[0] == 200
    assert (len(bad.requests), len(good.requests)) == (1, 1)


@pytest.mark.parametrize(
    ("status", "members", "headers"),
    [
        (
            503,
            {"message": "queue full", "type": "rate_limit_error", "code": "rate_limit_exceeded"},
            {"retry-after": "7"},
        ),
        (
            429,
            {"message": "slow down", "type": "rate_limit_error", "code": "rate_limit_exceeded"},
            {"retry-after": "2"},
        ),
        (400, {"message": "too long", "code": "context_length_exceeded", "max": 10}, {}),
        (500, {"message": "oops", "code": None}, {}),
    ],
)
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_refusal_passes_through_with_status_body_and_retry_after(
    make_site, make_neuron, status, members, headers, streamed
):
    site = await make_site(make_neuron("tiny", refusal=(status, members, headers)))
    given, body, got = await site.chat(stream=streamed)
    assert (given, body) == (status, {"error": members})
    assert got.get("retry-after") == headers.get("retry-after")


async def test_a_refusal_after_keep_alives_is_an_event(make_site, make_neuron, catalogue, monkeypatch):
    from helexa.gateway.catalogue import ModelEntry

    monkeypatch.setattr("helexa.gateway.proxy.KEEP_ALIVE_S", 0.05)
    neuron = make_neuron(load_s=0.2, refusal=(400, {"message": "bad seed", "code": "invalid_parameter"}, {}))
    site = await make_site(neuron, catalogue=catalogue(ModelEntry("cold")))
    error, finish, done = events(await site.stream("cold"))
    assert json.loads(error)["error"]["message"] == "bad seed"
    assert json.loads(error)["error"]["code"] == "invalid_parameter"
    assert json.loads(finish)["choices"][0]["finish_reason"] == "error"
    assert done == b"[DONE]"


async def test_a_connection_kept_too_long_does_not_fail_the_request(make_site, neuron):
    """The neuron closes idle connections; the gateway may learn of it only when it writes."""
    site = await make_site(neuron)
    connections = []
    original = site.gateway.dispatcher._session.connector._release

    def keep(key, protocol, **more):
        connections.append(protocol)
        original(key, protocol, **more)

    site.gateway.dispatcher._session.connector._release = keep
    assert (await site.chat())[0] == 200
    for protocol in connections:
        if protocol.transport is not None:
            protocol.transport.abort()
    assert (await site.chat())[0] == 200


async def test_connections_that_a_crowd_has_left_are_not_kept_by_polls(make_site, make_neuron, monkeypatch):
    connected = "helexa.gateway.gateway._connector"
    connector = aiohttp.TCPConnector
    monkeypatch.setattr(connected, lambda: connector(limit=0, keepalive_timeout=0.5))
    neuron = make_neuron("tiny", pause_s=0.02)
    site = await make_site(neuron, poll_interval_s=0.05)
    await asyncio.gather(*(site.stream() for _ in range(20)))
    requests = site.gateway.dispatcher._session.connector
    assert any(requests._conns.values())
    async with asyncio.timeout(10):
        while any(requests._conns.values()):
            await asyncio.sleep(0.05)
