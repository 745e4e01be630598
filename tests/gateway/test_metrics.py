"""What Prometheus is told."""

import asyncio

import pytest

from helexa.gateway.fleet import Fleet, Node
from helexa.gateway.metrics import Meter, Metrics
from helexa.wire.control import Activation, DeviceHealth, Health, ModelLoad

pytestmark = pytest.mark.timeout(60)
WHERE = {"model": "tiny", "node": "n0"}


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_request_counts_its_tokens_and_times(make_site, make_neuron, streamed):
    site = await make_site(make_neuron("tiny", pause_s=0.02))
    await (site.stream() if streamed else site.chat())
    assert await site.metric("helexa_requests_total", **WHERE) == 1
    assert await site.metric("helexa_request_errors_total", **WHERE) == 0
    assert await site.metric("helexa_prompt_tokens_total", **WHERE) == 7
    assert await site.metric("helexa_completion_tokens_total", **WHERE) == 4
    assert await site.metric("helexa_cached_prompt_tokens_total", **WHERE) == 3
    assert await site.metric("helexa_request_duration_seconds_count", **WHERE) == 1
    assert await site.metric("helexa_time_to_first_token_seconds_count", **WHERE) == streamed
    assert await site.metric("helexa_tokens_per_second_count", **WHERE) == streamed
    assert (await site.metric("helexa_inter_token_seconds_count", **WHERE) >= 3) is streamed


async def test_a_refused_request_is_counted_without_the_names_it_made_up(make_site, neuron):
    site = await make_site(neuron)
    await site.chat("made-up-1")
    await site.chat("made-up-2")
    assert await site.metric("helexa_request_errors_total", model="", node="", code="model_not_found") == 2


async def test_what_neurons_report_becomes_gauges(make_site, neuron):
    neuron.load_reports["tiny"] = {"queue_depth": 3, "max_in_flight": 4, "rejected_queue_full": 5}
    site = await make_site(neuron)
    assert await site.metric("helexa_node_up", node="n0") == 1
    assert await site.metric("helexa_model_queue_depth", **WHERE) == 3
    assert await site.metric("helexa_model_max_in_flight", **WHERE) == 4
    assert await site.metric("helexa_model_rejections_total", **WHERE, reason="queue_full") == 5
    async with site.client.get(site.metrics_url + "/metrics") as response:
        assert "helexa_model_tok_s_decode{" not in await response.text(), "an unknown rate is not zero"


def test_devices_are_shown_with_what_is_known_of_them():
    devices = [
        DeviceHealth(index=0, memory_used_bytes=5, memory_free_bytes=7, utilization_percent=50),
        DeviceHealth(index=1, memory_used_bytes=1, memory_free_bytes=2),
    ]
    node = Node("n", "http://n")
    node.health = Health(
        status="ok",
        uptime_s=1,
        memory_available_bytes=1,
        activation=Activation(state="ready"),
        models=[],
        devices=devices,
    )
    registry = Metrics(Fleet({"n": node})).registry
    assert registry.get_sample_value("helexa_device_memory_free_bytes", {"node": "n", "device": "1"}) == 2
    assert registry.get_sample_value("helexa_device_utilization_percent", {"node": "n", "device": "0"}) == 50
    assert (
        registry.get_sample_value("helexa_device_utilization_percent", {"node": "n", "device": "1"}) is None
    )


def test_the_first_text_is_not_the_role_nor_an_empty_delta_nor_a_comment():
    meter = Meter(Metrics(Fleet({})), "m", 0.0)
    meter.feed(b": keep-alive\n\n")
    meter.feed(b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n')
    assert meter.first_token_s is None
    meter.feed(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n')
    assert meter.first_token_s is not None


@pytest.mark.parametrize("name", ["reasoning_content", "arguments", "text"])
def test_any_generated_text_is_the_first(name):
    meter = Meter(Metrics(Fleet({})), "m", 0.0)
    meter.feed(b'data: {"choices":[{"delta":{"%s": "\\n"}}]}\n\n' % name.encode())
    assert meter.first_token_s is not None


def test_usage_is_that_of_the_last_events():
    meter = Meter(Metrics(Fleet({})), "m", 0.0)
    for index in range(10):
        meter.feed(b'data: {"usage":{"prompt_tokens":%d}}\n\n' % index)
    meter.feed(b'data: {"usage":{"prompt_tokens":9,"completion_tokens":12}}\n\n')
    meter.feed(b"data: [DONE]\n\n")
    meter.end()
    assert meter.usage == {"prompt_tokens": 9, "completion_tokens": 12}


def test_usage_may_be_a_comment_before_the_end():
    meter = Meter(Metrics(Fleet({})), "m", 0.0)
    meter.feed(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n')
    meter.feed(b': {"prompt_tokens":9,"completion_tokens":12,"total_tokens":21}\n\ndata: [DONE]\n\n')
    meter.end()
    assert meter.usage == {"prompt_tokens": 9, "completion_tokens": 12}


def test_without_usage_events_count_for_tokens():
    metrics = Metrics(Fleet({}))
    meter = Meter(metrics, "m", 0.0)
    for _ in range(3):
        meter.feed(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n' * 2)
    meter.end()
    labels = {"model": "m", "node": ""}
    assert metrics.registry.get_sample_value("helexa_completion_tokens_total", labels) == 5


def test_a_text_that_looks_like_usage_is_not_counted():
    meter = Meter(Metrics(Fleet({})), "m", 0.0)
    meter.feed(b'data: {"delta":{"content":"say \\"completion_tokens\\": 5"}}\n\n')
    meter.end()
    assert meter.usage == {}


async def test_a_model_that_is_reported_twice_by_two_nodes_is_two_samples(make_site, make_neuron):
    site = await make_site(make_neuron("tiny"), make_neuron("tiny"))
    await asyncio.gather(*(site.chat() for _ in range(4)))
    counts = [await site.metric("helexa_requests_total", model="tiny", node=name) for name in ("n0", "n1")]
    assert sum(counts) == 4


def test_a_load_that_is_not_told_is_no_gauge():
    node = Node("n", "http://n", loads={"m": ModelLoad(id="m")})
    registry = Metrics(Fleet({"n": node})).registry
    assert registry.get_sample_value("helexa_model_in_flight", {"node": "n", "model": "m"}) == 0
    assert registry.get_sample_value("helexa_model_max_in_flight", {"node": "n", "model": "m"}) is None
