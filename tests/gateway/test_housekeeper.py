"""What is unloaded, given back and forgotten without anybody asking."""

import asyncio
import time
from dataclasses import replace

import pytest

from helexa.gateway.catalogue import ModelEntry
from helexa.gateway.config import EvictionSection, GatewayConfig

pytestmark = pytest.mark.timeout(60)
MIB = 2**20


def config(**eviction):
    return replace(GatewayConfig(), eviction=EvictionSection(**eviction))


@pytest.fixture(autouse=True)
def quick_rounds(monkeypatch):
    monkeypatch.setattr("helexa.gateway.housekeeper.ROUND_S", 0.02)


async def rounds():
    await asyncio.sleep(0.3)


async def test_a_model_that_nobody_uses_is_unloaded_after_its_time(
    make_site, make_neuron, catalogue, eventually
):
    neuron = make_neuron("quick", "slow", "kept", "stranger")
    listed = catalogue(
        ModelEntry("quick", idle_ttl_s=0.1),
        ModelEntry("slow", idle_ttl_s=100),
        ModelEntry("kept", idle_ttl_s=0),
    )
    site = await make_site(neuron, catalogue=listed, config=config(idle_ttl_s=0.1))
    await eventually(lambda: "quick" not in neuron.models)
    await rounds()
    assert neuron.unloads == ["quick"], "one has time left, one has no end, one could not be brought back"
    assert await site.metric("helexa_evictions_total", model="quick", reason="idle") == 1
    assert (await site.chat("quick"))[0] == 200, "it is loaded again when it is asked for"


async def test_the_time_of_all_models_is_not_that_of_pinned_ones(
    make_site, make_neuron, catalogue, eventually
):
    neuron = make_neuron("pinned", "plain")
    listed = catalogue(ModelEntry("pinned", pinned_on=("n0",)), ModelEntry("plain"))
    await make_site(neuron, catalogue=listed, config=config(idle_ttl_s=0.1))
    await eventually(lambda: neuron.unloads)
    await rounds()
    assert neuron.unloads == ["plain"]


async def test_a_model_at_work_is_not_idle_and_each_request_begins_its_time_anew(
    make_site, make_neuron, catalogue
):
    neuron = make_neuron("m", pause_s=0.3)
    site = await make_site(neuron, catalogue=catalogue(ModelEntry("m", idle_ttl_s=1.0)))
    for _ in range(2):
        assert (await site.stream("m")).endswith(b"data: [DONE]\n\n")
        await asyncio.sleep(0.1)
        assert neuron.unloads == [], "the time of a request is no idle time"


async def test_by_default_nothing_is_unloaded(make_site, make_neuron, catalogue):
    neuron = make_neuron("m")
    site = await make_site(neuron, catalogue=catalogue(ModelEntry("m")))
    site.gateway.fleet.nodes["n0"].last_used["m"] = time.monotonic() - 1e6
    await rounds()
    assert neuron.unloads == []


async def swap(site, neuron, times):
    for index in range(times):
        assert (await site.chat("ab"[index % 2]))[0] == 200


@pytest.fixture
def pair(catalogue):
    return catalogue(*(ModelEntry(name, path=f"/{name}", vram_mb=600) for name in "ab"))


async def test_memory_that_models_left_behind_is_given_back_after_enough_unloads(
    make_site, make_neuron, pair, eventually
):
    neuron = make_neuron(memory_mib=600, unaccounted_bytes=600 * MIB)
    eviction = config(turn_s=0, defrag_after_cycles=3)
    site = await make_site(neuron, catalogue=pair, config=eviction, poll_interval_s=0.05)
    await swap(site, neuron, 3)
    await rounds()
    assert neuron.defrags == 0, "too few unloads"
    await swap(site, neuron, 3)
    await eventually(lambda: neuron.defrags == 1)
    await rounds()
    assert neuron.defrags == 1, "counting begins anew"
    assert await site.metric("helexa_defrags_total", node="n0") == 1


async def test_without_measured_fragmentation_nothing_is_loaded_anew(
    make_site, make_neuron, pair, eventually
):
    neuron = make_neuron(memory_mib=600, unaccounted_bytes=500 * MIB)
    eviction = config(turn_s=0, defrag_after_cycles=2)
    site = await make_site(neuron, catalogue=pair, config=eviction, poll_interval_s=0.05)
    await swap(site, neuron, 4)
    await eventually(lambda: site.gateway.fleet.nodes["n0"].unloads < 2)
    assert neuron.defrags == 0


async def test_a_node_at_work_is_left_alone(make_site, make_neuron, pair, eventually):
    neuron = make_neuron(memory_mib=600, unaccounted_bytes=600 * MIB)
    eviction = config(turn_s=0, defrag_after_cycles=1)
    site = await make_site(neuron, catalogue=pair, config=eviction, poll_interval_s=0.05)
    neuron.pause_s = 0.3
    await site.chat("a")
    streaming = asyncio.create_task(site.stream("b"))
    await eventually(lambda: neuron.running)
    await rounds()
    assert neuron.defrags == 0
    assert (await streaming).endswith(b"data: [DONE]\n\n")
    await eventually(lambda: neuron.defrags == 1)


async def test_an_errand_that_a_neuron_refuses_is_a_line_in_the_log(
    make_site, make_neuron, pair, eventually, caplog
):
    neuron = make_neuron(memory_mib=600, unaccounted_bytes=600 * MIB, defrag_status=503)
    eviction = config(turn_s=0, defrag_after_cycles=1)
    site = await make_site(neuron, catalogue=pair, config=eviction, poll_interval_s=0.05)
    await swap(site, neuron, 2)
    await eventually(lambda: "errand_failed" in caplog.text)
    assert (await site.chat("a"))[0] == 200
