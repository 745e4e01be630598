"""How the gateway learns of its neurons."""

import pytest

from helexa.gateway.config import AuthSection, GatewayConfig

pytestmark = pytest.mark.timeout(60)


async def test_the_first_poll_is_over_when_the_gateway_begins(make_site, make_neuron):
    site = await make_site(make_neuron("a"), make_neuron("b", total_bytes=5))
    first, second = site.gateway.fleet.nodes.values()
    assert first.routable
    assert second.routable
    assert list(first.models) == ["a"]
    assert second.devices[0].total_bytes == 5


async def test_a_node_is_down_after_three_failures_and_up_after_one_success(make_site, neuron):
    site = await make_site(neuron, poll_interval_s=60)
    node, poller = site.gateway.fleet.nodes["n0"], site.gateway.poller
    endpoint, node.endpoint = node.endpoint, "http://127.0.0.1:1"
    for expected in (True, True, False, False):
        assert not await poller.poll(node)
        assert node.healthy is expected
    assert node.error == "cannot connect: connection refused"
    node.endpoint = endpoint
    assert await poller.poll(node)
    assert (node.healthy, node.failures, node.error) == (True, 0, None)


@pytest.mark.parametrize("answer", [(200, "{}"), (200, "not json"), (500, "{}")])
async def test_an_answer_that_makes_no_sense_is_a_failure(make_site, neuron, monkeypatch, answer):
    site = await make_site(neuron, poll_interval_s=60)
    monkeypatch.setattr(type(neuron), "health", lambda self, _: answer[1] if answer[0] == 200 else 1 / 0)
    node = site.gateway.fleet.nodes["n0"]
    assert not await site.gateway.poller.poll(node)
    assert node.failures == 1


async def test_a_list_in_broken_utf_8_is_a_failure(make_site, serving, neuron):
    async def broken(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'{"data": [{"id": "\xff"}]}'})

    host, port = await serving(broken)
    neuron.entry = {"kind": "openai"}
    site = await make_site(neuron, poll_interval_s=60)
    node = site.gateway.fleet.nodes["n0"]
    node.endpoint = f"http://{host}:{port}"
    assert not await site.gateway.poller.poll(node)
    assert "decode" in node.error


async def test_a_suspect_gets_no_requests_until_a_poll_made_at_once_has_cleared_it(
    make_site, neuron, eventually
):
    site = await make_site(neuron, poll_interval_s=60)
    node = site.gateway.fleet.nodes["n0"]
    site.gateway.poller.suspect(node)
    assert not node.routable
    await eventually(lambda: node.routable)


async def test_models_that_come_and_go_are_seen(make_site, neuron, eventually):
    site = await make_site(neuron, poll_interval_s=0.02)
    node = site.gateway.fleet.nodes["n0"]
    neuron.hold("second")
    await eventually(lambda: "second" in node.models)
    del neuron.models["tiny"]
    await eventually(lambda: "tiny" not in node.models)


async def test_hardware_is_asked_for_again_after_a_restart(make_site, neuron, monkeypatch):
    site = await make_site(neuron, poll_interval_s=60)
    node = site.gateway.fleet.nodes["n0"]
    neuron.total_bytes = 77
    await site.poll()
    assert node.discovery.cpu.memory_total_bytes == 1000 * 2**20
    health = neuron.health(None) | {"uptime_s": 1.0}
    monkeypatch.setattr(type(neuron), "health", lambda self, _: health)
    await site.poll()
    assert node.discovery.cpu.memory_total_bytes == 77


async def test_a_neuron_that_is_down_does_not_hold_up_the_start(make_site, neuron):
    site = await make_site(neuron, endpoints=("http://127.0.0.1:1",))
    assert site.gateway.fleet.nodes["n0"].healthy
    assert not site.gateway.fleet.nodes["x0"].healthy
    assert (await site.chat())[0] == 200


async def test_the_time_of_a_load_is_known_of_models_that_came_while_we_looked(make_site, neuron):
    neuron.hold("tiny", load_seconds=2.5, loaded_at=1)
    site = await make_site(neuron, poll_interval_s=60)
    node = site.gateway.fleet.nodes["n0"]
    assert node.loaded_since == {}, "it may have been there for days"
    assert node.load_seconds == {"tiny": 2.5}
    neuron.hold("late", loaded_at=1)
    await site.poll()
    first = node.loaded_since["late"]
    await site.poll()
    assert node.loaded_since == {"late": first}
    neuron.hold("late", loaded_at=2)
    await site.poll()
    assert node.loaded_since["late"] > first, "it was loaded anew"
    del neuron.models["late"]
    await site.poll()
    assert node.loaded_since == {}
    assert list(node.seen) == ["tiny", "late"]


async def test_what_others_use_is_used(make_site, neuron):
    site = await make_site(neuron, poll_interval_s=60)
    node = site.gateway.fleet.nodes["n0"]
    assert "tiny" not in node.last_used
    neuron.load_reports["tiny"] = {"in_flight": 1}
    await site.poll()
    assert node.last_used["tiny"] > 0


async def test_a_load_under_way_is_looked_at_more_often(make_site, neuron, eventually, monkeypatch):
    monkeypatch.setattr("helexa.gateway.poller.LOADING_S", 0.02)
    neuron.hold("slow", status="loading", progress={"phase": "weights", "percent": 1.0})
    site = await make_site(neuron, poll_interval_s=60)
    neuron.hold("slow", status="loading", progress={"phase": "weights", "percent": 80.0})
    node = site.gateway.fleet.nodes["n0"]
    await eventually(lambda: node.progress("slow").percent == 80.0)


SECRET = "a-secret-of-the-fleet"


async def test_a_neuron_with_a_secret_serves_the_gateway_that_knows_it(make_site, make_neuron):
    neuron = make_neuron("tiny", secret=SECRET)
    config = GatewayConfig(auth=AuthSection(neuron_secret=SECRET))
    site = await make_site(neuron, config=config)
    site.client.headers["authorization"] = "Bearer of-the-client"
    assert (await site.chat())[0] == 200
    async with site.client.post(site.url + "/models/load", json={"model_id": "new"}) as response:
        assert response.status == 200
    shown = [await site.get(path) for path in ("/fleet", "/health", "/v1/models")]
    assert SECRET not in str(shown)


@pytest.mark.parametrize("secret", [None, "another-secret-altogether"])
async def test_a_neuron_whose_secret_is_not_known_is_down_and_says_why(
    make_site, make_neuron, secret, eventually
):
    neuron = make_neuron("tiny", secret=SECRET)
    site = await make_site(neuron, config=GatewayConfig(auth=AuthSection(neuron_secret=secret)))
    (node,) = site.gateway.fleet.nodes.values()
    await eventually(lambda: node.error is not None)
    assert node.error == "it does not know our secret (status 401)"
    assert (await site.chat())[0] == 503
    assert neuron.requests == []
