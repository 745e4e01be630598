"""/v1/models, /health and /fleet."""

import asyncio
import time

import pytest

from helexa.gateway.catalogue import Cost, Limit, ModelEntry
from helexa.gateway.fleet import Claim

pytestmark = pytest.mark.timeout(60)


async def test_a_loaded_model_is_listed_with_what_its_neuron_says(make_site, neuron):
    neuron.hold("tiny", memory_mib=250, tool_call=True, loaded_at=1700000000)
    site = await make_site(neuron)
    listed = await site.get("/v1/models")
    assert listed["object"] == "list"
    assert listed["data"] == [
        {
            "id": "tiny",
            "object": "model",
            "created": 1700000000,
            "owned_by": "helexa",
            "loaded": True,
            "feasible_on": ["n0"],
            "locations": [{"node": "n0", "status": "loaded", "vram_estimate_mb": 250}],
            "capabilities": ["text"],
            "tool_call": True,
            "reasoning": False,
            "limit": {"context": 8192},
            "max_model_len": 8192,
        }
    ]
    assert await site.get("/v1/models/tiny") == listed["data"][0]


async def test_a_cold_model_is_listed_from_the_catalogue(make_site, make_neuron, catalogue):
    entry = ModelEntry(
        "org/cold",
        vram_mb=500,
        limit=Limit(4096, output=512),
        cost=Cost(0.0, 1.5),
        capabilities=("text",),
    )
    site = await make_site(make_neuron(), make_neuron(total_bytes=1), catalogue=catalogue(entry))
    card = await site.get("/v1/models/org/cold")
    assert card["loaded"] is False
    assert card["feasible_on"] == ["n0"]
    assert card["locations"] == []
    assert card["limit"] == {"context": 4096, "output": 512}
    assert (card["max_model_len"], card["max_output_tokens"]) == (4096, 512)
    assert card["cost"] == {"input": 0.0, "output": 1.5}


async def test_what_is_not_known_is_left_out(make_site, make_neuron, catalogue):
    site = await make_site(make_neuron(), catalogue=catalogue(ModelEntry("cold")))
    assert not {"limit", "cost", "max_model_len"} & set(await site.get("/v1/models/cold"))


async def test_the_tightest_replica_sets_the_limit_and_capabilities_add_up(make_site, make_neuron):
    wide, tight = make_neuron(), make_neuron()
    wide.hold("m", limit={"context": 9000, "output": 100}, capabilities=["text"])
    tight.hold("m", limit={"context": 5000}, capabilities=["vision"], reasoning=True)
    site = await make_site(wide, tight)
    card = await site.get("/v1/models/m")
    assert card["limit"] == {"context": 5000}
    assert card["capabilities"] == ["text", "vision"]
    assert card["reasoning"] is True
    assert [place["node"] for place in card["locations"]] == ["n0", "n1"]


async def test_an_alias_is_listed_as_a_model_unless_it_leads_nowhere(make_site, neuron, catalogue):
    site = await make_site(neuron, catalogue=catalogue(small="tiny", lost="nothing"))
    listed = {card["id"]: card for card in (await site.get("/v1/models"))["data"]}
    assert sorted(listed) == ["small", "tiny"]
    assert listed["small"] == listed["tiny"] | {"id": "small"}


async def test_a_load_under_way_is_listed_with_its_progress(make_site, neuron):
    neuron.hold("slow", status="loading", progress={"phase": "weights", "percent": 40.0})
    site = await make_site(neuron)
    card = await site.get("/v1/models/slow")
    assert card["loaded"] is False
    assert card["locations"][0]["status"] == "loading"
    assert card["locations"][0]["progress"] == {"phase": "weights", "percent": 40.0}


async def test_a_load_that_has_just_begun_is_listed(make_site, make_neuron, catalogue, eventually):
    site = await make_site(make_neuron(load_s=5.0), catalogue=catalogue(ModelEntry("cold")))
    asked = asyncio.create_task(site.chat("cold"))
    await eventually(lambda: site.gateway.fleet.loading)
    card = await site.get("/v1/models/cold")
    progress = {"phase": "queued", "percent": 0.0}
    assert card["locations"] == [{"node": "n0", "status": "loading", "progress": progress}]
    asked.cancel()


async def test_a_model_that_was_loaded_once_keeps_what_is_known_of_it(make_site, neuron, catalogue):
    neuron.hold("tiny", tool_call=True, limit={"context": 777}, capabilities=["text", "tool_call"])
    site = await make_site(neuron, catalogue=catalogue(ModelEntry("tiny")))
    neuron.hold("tiny", status="unloaded", limit=None, capabilities=[])
    await site.poll()
    card = await site.get("/v1/models/tiny")
    assert (card["loaded"], card["tool_call"], card["limit"]) == (False, True, {"context": 777})
    assert card["capabilities"] == ["text", "tool_call"]


async def test_a_model_that_a_neuron_could_load_is_listed_and_loaded(make_site, make_neuron):
    neuron = make_neuron()
    neuron.models["own"] = {"id": "own", "status": "unloaded", "source": "own.gguf"}
    site = await make_site(neuron)
    card = await site.get("/v1/models/own")
    assert (card["loaded"], card["feasible_on"]) == (False, ["n0"])
    assert card["locations"] == [{"node": "n0", "status": "unloaded"}]
    assert (await site.chat("own"))[0] == 200
    assert neuron.loads == [{"model_id": "own", "wait": True}]


async def test_who_waits_for_a_turn_is_shown(make_site, neuron):
    site = await make_site(neuron)
    claim = Claim(since=time.monotonic() - 5, node="n0", displaces=("tiny",), num_requests=2)
    site.gateway.fleet.claims["other"] = claim
    told = (await site.get("/fleet"))["waiting"]["other"]
    assert told.pop("seconds") >= 5
    assert told == {"node": "n0", "requests": 2, "displaces": ["tiny"]}


async def test_an_unknown_model_is_404(make_site, neuron):
    site = await make_site(neuron)
    error = (await site.get("/v1/models/org/other"))["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")


async def test_health_is_ok_impaired_or_degraded(make_site, neuron):
    site = await make_site(neuron, poll_interval_s=60)
    assert await site.get("/health") == {"status": "ok", "nodes": {"healthy": 1, "total": 1}}
    neuron.load_reports["tiny"] = {"poisoned": "illegal address"}
    await site.poll()
    health = await site.get("/health")
    assert health["status"] == "impaired"
    assert health["unservable"] == [
        {"node": "n0", "model": "tiny", "reason": "poisoned", "detail": "illegal address"}
    ]
    site.gateway.fleet.nodes["n0"].healthy = False
    assert await site.get("/health") == {"status": "degraded", "nodes": {"healthy": 0, "total": 1}}


async def test_a_default_model_that_failed_to_load_impairs(make_site, neuron):
    neuron.hold("bad", status="failed", error={"code": "invalid_model_file", "message": "truncated"})
    site = await make_site(neuron)
    assert (await site.get("/health"))["unservable"][0]["detail"] == "truncated"


async def test_the_fleet_report_shows_nodes_devices_models_and_load(make_site, neuron, catalogue):
    neuron.load_reports["tiny"] = {"in_flight": 2, "max_in_flight": 4, "tok_s_decode": 33.5}
    site = await make_site(neuron, endpoints=("http://127.0.0.1:1",), catalogue=catalogue(small="tiny"))
    report = await site.get("/fleet")
    up, down = report["nodes"]
    assert (up["name"], up["state"], up["endpoint"]) == ("n0", "up", neuron.url)
    assert up["devices"] == [{"index": 0, "name": "CPU", "total_bytes": 1000 << 20, "free_bytes": 900 << 20}]
    (model,) = up["models"]
    assert (model["id"], model["status"], model["serving"]) == ("tiny", "loaded", True)
    assert model["load"]["in_flight"] == 2
    assert down["state"] == "down"
    assert down["error"]
    assert report["aliases"] == {"small": "tiny"}
