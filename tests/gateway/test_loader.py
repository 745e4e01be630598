"""Cold loads and evictions, seen from the client and from the neuron."""

import asyncio
import json
from dataclasses import replace

import pytest

from helexa.gateway.catalogue import ModelEntry
from helexa.gateway.config import EvictionSection, GatewayConfig

pytestmark = pytest.mark.timeout(60)

AT_ONCE = replace(GatewayConfig(), eviction=EvictionSection(turn_s=0))
COLD = ModelEntry("cold", path="/models/cold.gguf", vram_mb=600)


async def test_a_model_that_is_not_loaded_is_loaded_for_the_request(make_site, make_neuron, catalogue):
    neuron = make_neuron()
    site = await make_site(neuron, catalogue=catalogue(COLD))
    status, body, _ = await site.chat("cold")
    assert (status, body["model"]) == (200, "cold")
    assert neuron.loads == [{"model_id": "cold", "source": "/models/cold.gguf", "wait": True}]
    assert (await site.chat("cold"))[0] == 200
    assert len(neuron.loads) == 1
    assert await site.metric("helexa_loads_total", model="cold", node="n0", outcome="loaded") == 1
    assert await site.metric("helexa_cold_starts_total", model="cold", node="n0") == 1


async def test_twenty_requests_for_a_cold_model_are_one_load(make_site, make_neuron, catalogue):
    neuron = make_neuron(load_s=0.3)
    site = await make_site(neuron, catalogue=catalogue(COLD))
    answers = await asyncio.gather(*(site.chat("cold") for _ in range(20)))
    assert [status for status, _, _ in answers] == [200] * 20
    assert len(neuron.loads) == 1
    assert len(neuron.requests) == 20


async def test_a_load_that_somebody_else_began_is_waited_for(make_site, make_neuron, eventually):
    neuron = make_neuron(load_s=0.2)
    neuron.hold("slow", status="loading")
    site = await make_site(neuron)
    assert (await site.chat("slow"))[0] == 200
    assert neuron.loads == [{"model_id": "slow", "wait": True}]


async def test_a_stream_hears_keep_alives_while_its_model_is_loaded(
    make_site, make_neuron, catalogue, monkeypatch
):
    monkeypatch.setattr("helexa.gateway.proxy.KEEP_ALIVE_S", 0.05)
    site = await make_site(make_neuron(load_s=0.4), catalogue=catalogue(COLD))
    text = await site.stream("cold")
    head, _, rest = text.partition(b"data: ")
    assert head.count(b": keep-alive\n\n") >= 3
    assert rest.endswith(b"data: [DONE]\n\n")


async def test_a_load_goes_on_when_its_client_leaves(make_site, make_neuron, catalogue, eventually):
    neuron = make_neuron(load_s=0.3)
    site = await make_site(neuron, catalogue=catalogue(COLD))
    request = asyncio.create_task(site.chat("cold"))
    await eventually(lambda: neuron.loads)
    request.cancel()
    await eventually(lambda: site.gateway.fleet.nodes["n0"].is_loaded("cold"))
    assert (await site.chat("cold"))[0] == 200
    assert len(neuron.loads) == 1


async def test_room_is_made_by_unloading(make_site, make_neuron, catalogue):
    neuron = make_neuron()
    neuron.hold("older", memory_mib=300)
    neuron.hold("newer", memory_mib=300)
    site = await make_site(neuron, catalogue=catalogue(COLD, ModelEntry("older"), ModelEntry("newer")))
    await site.chat("older")
    await site.chat("newer")
    assert (await site.chat("cold"))[0] == 200
    assert neuron.unloads == ["older"]
    assert sorted(neuron.models) == ["cold", "newer"]
    assert await site.metric("helexa_evictions_total", model="older", node="n0") == 1
    assert await site.metric("helexa_evictions_total", model="newer", node="n0") == 0


async def test_a_model_that_nobody_but_its_neuron_knew_comes_back_after_it_had_to_leave(
    make_site, make_neuron, catalogue
):
    neuron = make_neuron(memory_mib=600)
    neuron.hold("by hand", memory_mib=600)
    site = await make_site(neuron, catalogue=catalogue(COLD), config=AT_ONCE)
    assert (await site.chat("cold"))[0] == 200
    assert neuron.unloads == ["by hand"]
    assert (await site.get("/v1/models/by hand"))["loaded"] is False
    assert (await site.chat("by hand"))[0] == 200
    assert neuron.loads[-1] == {"model_id": "by hand", "source": "by hand.gguf", "wait": True}
    assert neuron.unloads == ["by hand", "cold"], "it needs the room that it had"
    assert site.gateway.fleet.nodes["n0"].displaced.keys() == {"cold"}


async def test_a_request_waits_for_a_model_at_work_to_end_and_then_takes_its_place(
    make_site, make_neuron, catalogue
):
    neuron = make_neuron(pause_s=0.1)
    neuron.hold("working", memory_mib=600)
    site = await make_site(neuron, catalogue=catalogue(COLD, ModelEntry("working")), placement_wait_s=10)
    first = asyncio.create_task(site.stream("working"))
    await asyncio.sleep(0.2)
    assert (await site.chat("cold"))[0] == 200
    assert (await first).endswith(b"data: [DONE]\n\n")
    assert neuron.unloads == ["working"]


async def test_a_request_that_finds_no_room_in_time_may_come_back(make_site, make_neuron, catalogue):
    neuron = make_neuron()
    neuron.hold("vip", memory_mib=600)
    site = await make_site(neuron, catalogue=catalogue(COLD, ModelEntry("vip", pinned_on=("n0",))))
    status, body, headers = await site.chat("cold")
    assert (status, body["error"]["code"], headers["retry-after"]) == (503, "service_unavailable", "5")
    assert neuron.unloads == []


async def test_a_load_that_cannot_succeed_is_told_in_the_neurons_words(make_site, make_neuron, catalogue):
    error = {"message": "no such file: /models/cold.gguf", "code": "repo_fetch_failed"}
    neuron = make_neuron(load_error=(422, error))
    site = await make_site(neuron, catalogue=catalogue(COLD))
    status, body, headers = await site.chat("cold")
    assert (status, body["error"]["code"]) == (404, "service_unavailable")
    assert "no such file: /models/cold.gguf" in body["error"]["message"]
    assert "retry-after" not in headers
    assert (await site.chat("cold"))[0] == 404
    assert len(neuron.loads) == 1, "the same was tried again at once"
    assert await site.metric("helexa_loads_total", model="cold", outcome="failed") == 1
    assert await site.metric("helexa_request_errors_total", model="cold", code="service_unavailable") == 2


async def test_a_load_that_fails_for_now_may_be_tried_again(make_site, make_neuron, catalogue):
    neuron = make_neuron(load_error=(503, {"message": "too little memory", "code": "insufficient_memory"}))
    site = await make_site(neuron, catalogue=catalogue(COLD))
    status, body, headers = await site.chat("cold")
    assert (status, headers["retry-after"]) == (503, "5")
    assert "too little memory" in body["error"]["message"]


async def test_after_a_failed_load_another_node_is_asked(make_site, make_neuron, catalogue):
    bad = make_neuron(load_error=(503, {"message": "no"}), total_bytes=2000 << 20)
    good = make_neuron()
    site = await make_site(bad, good, catalogue=catalogue(COLD))
    assert (await site.chat("cold"))[0] == 200
    assert (len(bad.loads), len(good.loads)) == (1, 1)


async def test_a_stream_that_waited_hears_of_a_failed_load_as_an_event(
    make_site, make_neuron, catalogue, monkeypatch
):
    monkeypatch.setattr("helexa.gateway.proxy.KEEP_ALIVE_S", 0.05)
    neuron = make_neuron(load_s=0.2, load_error=(422, {"message": "broken file"}))
    site = await make_site(neuron, catalogue=catalogue(COLD))
    text = await site.stream("cold")
    events = [line[6:] for line in text.split(b"\n\n") if line.startswith(b"data: ")]
    assert "broken file" in json.loads(events[0])["error"]["message"]
    assert json.loads(events[1])["choices"][0]["finish_reason"] == "error"
    assert events[2] == b"[DONE]"


async def test_a_model_unloaded_since_the_last_poll_is_loaded_again(make_site, neuron, catalogue):
    site = await make_site(neuron, catalogue=catalogue(ModelEntry("tiny")), poll_interval_s=60)
    neuron.models.clear()
    assert (await site.chat("tiny"))[0] == 200
    assert len(neuron.loads) == 1


async def test_a_model_that_the_neuron_loads_again_meanwhile_is_waited_for(make_site, neuron):
    site = await make_site(neuron, poll_interval_s=60)
    neuron.hold("tiny", status="loading")
    error = {"message": "loading", "code": "model_loading"}
    neuron.refusal = (503, error, {"retry-after": "9"})
    neuron.load_s = 0.1
    request = asyncio.create_task(site.chat())
    while not neuron.loads:
        await asyncio.sleep(0.01)
    neuron.refusal = None
    assert (await request)[0] == 200
    assert neuron.loads == [{"model_id": "tiny", "wait": True}]


async def test_a_poisoned_model_is_unavailable_until_it_has_been_loaded_again(make_site, neuron, eventually):
    neuron.load_reports["tiny"] = {"poisoned": "illegal address"}
    neuron.load_s = 0.5
    site = await make_site(neuron, poll_interval_s=60)
    status, body, headers = await site.chat()
    assert (status, body["error"]["code"], headers["retry-after"]) == (503, "service_unavailable", "2")
    status, _, headers = await site.chat()
    assert (status, headers["retry-after"]) == (503, "2"), "the same while it is recovering"
    await eventually(lambda: site.gateway.fleet.nodes["n0"].is_loaded("tiny"))
    assert (await site.chat())[0] == 200
    assert len(neuron.loads) == 1
    assert len(neuron.requests) == 1


async def test_a_model_that_only_the_neuron_knew_is_not_found_once_it_is_gone(make_site, neuron):
    site = await make_site(neuron, poll_interval_s=60)
    neuron.models.clear()
    status, body, _ = await site.chat("tiny")
    assert (status, body["error"]["code"]) == (404, "model_not_found")
