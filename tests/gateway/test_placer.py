"""Who waits for whom when models share a node, and what clients that do not wait are told."""

import asyncio
import random
import time
from dataclasses import replace

import pytest

from helexa.errors import InvalidParameter
from helexa.gateway.catalogue import ModelEntry
from helexa.gateway.config import EvictionSection, GatewayConfig
from helexa.gateway.fleet import Claim
from helexa.gateway.placer import wait_of

pytestmark = pytest.mark.timeout(60)
MIB = 2**20

A, B = (ModelEntry(name, path=f"/{name}.gguf", vram_mb=600) for name in "ab")


def turns_of(seconds, **more):
    return replace(GatewayConfig(), eviction=EvictionSection(turn_s=seconds, **more))


async def ask(site, model, **headers):
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    started = time.monotonic()
    async with site.client.post(
        site.url + "/v1/chat/completions", json=body, headers={"x-helexa-wait": "60"} | headers
    ) as response:
        return response.status, time.monotonic() - started, await response.json(), response.headers


@pytest.fixture
async def shared(make_site, make_neuron, catalogue):
    """A node with room for one of two models, each of which takes 0.3 s to load."""
    return await make_site(
        make_neuron(load_s=0.3, memory_mib=600, pause_s=0.005),
        catalogue=catalogue(A, B),
        config=turns_of(2.0),
    )


async def test_two_alternating_clients_are_served_in_batches(shared):
    neuron = shared.neurons[0]

    async def client(model):
        return [await ask(shared, model) for _ in range(60)]

    answers = [answer for half in await asyncio.gather(client("a"), client("b")) for answer in half]
    assert [status for status, *_ in answers] == [200] * 120
    assert len(neuron.requests) == 120
    assert len(neuron.loads) <= 8, "each change of models serves many requests"
    assert max(waited for _, waited, *_ in answers) < 10, (
        "a turn, a load and what was at work, with much to spare"
    )
    assert await shared.metric("helexa_swaps_total", model="b") >= 1
    assert await shared.metric("helexa_cold_starts_total", model="b") >= 1
    assert shared.gateway.fleet.claims == {}


async def test_without_turns_each_request_is_a_load(make_site, make_neuron, catalogue):
    neuron = make_neuron(load_s=0.05, memory_mib=600)
    site = await make_site(neuron, catalogue=catalogue(A, B), config=turns_of(0.0))
    for _ in range(5):
        assert (await ask(site, "a"))[0] == (await ask(site, "b"))[0] == 200
    assert len(neuron.loads) == 10, "the neuron stand-in shows what batching spares"


async def test_an_endless_crowd_does_not_keep_another_model_out(shared):
    """Requests for `a` overlap all the time, so that it has no idle moment by itself."""
    neuron, crowd_leaves = shared.neurons[0], asyncio.Event()
    neuron.words = ["x"] * 40

    async def member():
        served = 0
        while not crowd_leaves.is_set():
            status, *_ = await ask(shared, "a")
            served += status == 200
        return served

    await ask(shared, "a")
    crowd = [asyncio.create_task(member()) for _ in range(4)]
    await asyncio.sleep(0.1)
    status, waited, *_ = await ask(shared, "b")
    crowd_leaves.set()
    assert status == 200
    assert waited < 15
    assert all(served >= 1 for served in await asyncio.gather(*crowd)), "and the crowd is served after that"
    assert neuron.cancelled == 0, "nobody was cut off"


async def test_a_request_at_work_for_too_long_gives_the_place_of_those_who_wait_for_it_back(
    make_site, make_neuron, catalogue
):
    neuron = make_neuron(words=["x"] * 50, pause_s=0.05)
    neuron.hold("a", memory_mib=600)
    site = await make_site(neuron, catalogue=catalogue(A, B), config=turns_of(0.1), placement_wait_s=0.5)
    endless = asyncio.create_task(site.stream("a"))
    await asyncio.sleep(0.2)
    status, _, body, headers = await ask(site, "b")
    assert (status, headers["retry-after"]) == (503, "5")
    assert "still at work" in body["error"]["message"]
    assert site.gateway.fleet.claims == {}, "new requests for `a` are let in again"
    assert (await endless).endswith(b"data: [DONE]\n\n")
    assert neuron.unloads == []


async def test_a_client_that_does_not_wait_is_told_how_far_the_load_is(make_site, make_neuron, catalogue):
    neuron = make_neuron(load_s=1.0)
    site = await make_site(neuron, catalogue=catalogue(A), poll_interval_s=0.05)
    status, waited, body, headers = await ask(site, "a", **{"x-helexa-wait": "0"})
    assert (status, body["error"]["code"], body["error"]["param"]) == (503, "model_loading", "model")
    assert body["error"]["progress"] == {"phase": "queued", "percent": 0.0, "node": "n0"}
    assert 1 <= int(headers["retry-after"]) <= 10
    assert waited < 0.9
    progress = {"phase": "weights", "percent": 40.0, "remaining_s": 3.2}
    neuron.hold("a", status="loading", progress=progress)
    await site.poll()
    _, _, body, headers = await ask(site, "a", **{"x-helexa-wait": "0"})
    assert body["error"]["progress"] == {**progress, "node": "n0"}
    assert headers["retry-after"] == "4"
    assert (await ask(site, "a"))[0] == 200, "the load went on"
    assert len(neuron.loads) == 1


async def test_a_client_that_comes_back_keeps_its_place_in_the_line(shared, eventually):
    await ask(shared, "a")
    status, _, body, headers = await ask(shared, "b", **{"x-helexa-wait": "0"})
    assert (status, body["error"]["code"]) == (503, "model_loading")
    assert body["error"]["progress"]["phase"] == "waiting"
    assert body["error"]["progress"]["displaces"] == ["a"]
    assert 1 <= int(headers["retry-after"]) <= 10
    await eventually(lambda: shared.gateway.fleet.nodes["n0"].is_loaded("b"))
    assert (await ask(shared, "b", **{"x-helexa-wait": "0"}))[0] == 200


async def test_a_client_may_wait_a_little(make_site, make_neuron, catalogue):
    site = await make_site(make_neuron(load_s=0.2), catalogue=catalogue(A))
    assert (await ask(site, "a", **{"x-helexa-wait": "20"}))[0] == 200


async def test_a_claim_whose_client_does_not_come_back_is_forgotten(shared, monkeypatch, eventually):
    monkeypatch.setattr("helexa.gateway.placer.CLAIM_MEMORY_S", 0.0)
    neuron = shared.neurons[0]
    neuron.pause_s = 1.0
    busy = asyncio.create_task(ask(shared, "a"))
    await eventually(lambda: neuron.running)
    await ask(shared, "b", **{"x-helexa-wait": "0"})
    assert "b" in shared.gateway.fleet.claims
    await eventually(lambda: not shared.gateway.fleet.claims)
    assert (await busy)[0] == 200
    assert neuron.unloads == []


async def test_nothing_is_swapped_for_a_client_that_has_left(shared, eventually):
    neuron, fleet = shared.neurons[0], shared.gateway.fleet
    await ask(shared, "a")
    request = asyncio.create_task(ask(shared, "b"))
    await eventually(lambda: fleet.claims)
    request.cancel()
    await eventually(lambda: not fleet.claims)
    assert neuron.unloads == []


async def test_a_claim_that_leads_nowhere_ends_quietly(shared):
    fleet = shared.gateway.fleet
    fleet.claims["no such model"] = Claim(since=time.monotonic(), node="n0", asked_at=time.monotonic())
    shared.gateway.dispatcher._placer.pursue(time.monotonic())
    assert fleet.claims == {}


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"x-helexa-wait": "0"}, 0),
        ({"x-helexa-wait": "2.5"}, 2.5),
        ({"prefer": "wait=10"}, 10),
        ({"prefer": "respond-async, wait=10; x"}, 10),
        ({"prefer": "return=minimal"}, None),
        ({"prefer": "wait=soon"}, None),
        ({"prefer": "wait=10", "x-helexa-wait": "1"}, 1),
    ],
)
def test_how_long_a_client_waits(headers, expected):
    assert wait_of(headers) == expected


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf", ""])
def test_a_wait_that_is_no_time_is_refused(value):
    with pytest.raises(InvalidParameter, match="expected seconds"):
        wait_of({"x-helexa-wait": value})


async def test_a_stream_whose_client_does_not_wait_for_long_is_refused_with_a_status(
    make_site, make_neuron, catalogue, monkeypatch
):
    monkeypatch.setattr("helexa.gateway.proxy.KEEP_ALIVE_S", 0.05)
    site = await make_site(make_neuron(load_s=2.0), catalogue=catalogue(A))
    body = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    async with site.client.post(
        site.url + "/v1/chat/completions", json=body, headers={"prefer": "wait=1"}
    ) as response:
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "model_loading"


@pytest.mark.parametrize("room_mib", [1000, 1500], ids=["for one", "for two"])
async def test_more_models_than_room_are_all_served_and_nothing_is_left_behind(
    make_site, make_neuron, catalogue, room_mib
):
    neuron = make_neuron(load_s=0.05, memory_mib=600, pause_s=0.002, total_bytes=room_mib * MIB)
    listed = catalogue(*(ModelEntry(name, path=f"/{name}", vram_mb=600) for name in "abcde"))
    site = await make_site(neuron, catalogue=listed, config=turns_of(0.3), poll_interval_s=0.1)

    async def client(seed):
        pick = random.Random(seed)
        return [(await ask(site, pick.choice("abcde")))[0] for _ in range(12)]

    answers = await asyncio.gather(*(client(seed) for seed in range(8)))
    assert answers == [[200] * 12] * 8
    fleet = site.gateway.fleet
    assert (fleet.claims, fleet.loading, fleet.failed) == ({}, {}, {})
    assert sum(fleet.nodes["n0"].active.values()) == 0
    assert len(neuron.models) <= room_mib // 600
    assert len(neuron.loads) < 70
