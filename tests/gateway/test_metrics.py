"""What Prometheus is told."""

import asyncio

import pytest

from helexa.gateway.fleet import Claim, Fleet, Node
from helexa.gateway.metrics import CLIENT_CLOSED, OTHER_CODE, Meter, Metrics
from helexa.wire.control import (
    Activation,
    Cpu,
    Device,
    DeviceHealth,
    Discovery,
    Health,
    ModelInfo,
    ModelLoad,
    Progress,
)

pytestmark = pytest.mark.timeout(60)
WHERE = {"model": "tiny", "node": "n0"}
MIB = 2**20


def node_with(devices, readings):
    """A node with 100 MiB of main memory, 99 of them free."""
    cpu = Cpu(name="CPU", cores=1, threads=1, instruction_sets=[], memory_total_bytes=100 * MIB)
    node = Node("n", "http://n")
    node.discovery = Discovery(hostname="n", os="", kernel="", cpu=cpu, devices=devices)
    node.health = Health(
        status="ok",
        uptime_s=1,
        memory_available_bytes=99 * MIB,
        activation=Activation(state="ready"),
        models=[],
        devices=readings,
        unaccounted_bytes=77,
    )
    return node


def sample_of(fleet):
    """`told(name, **labels)`: a sample of what is shown of the fleet; None if there is none."""
    registry = Metrics(fleet).registry
    return lambda name, **labels: registry.get_sample_value(f"helexa_{name}", labels)


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


@pytest.mark.parametrize(
    ("code", "label"),
    [("model_loading", "model_loading"), (CLIENT_CLOSED, CLIENT_CLOSED), ("of_its_own_4711", OTHER_CODE)],
)
def test_only_codes_of_ours_are_labels(code, label):
    metrics = Metrics(Fleet({}))
    meter = Meter(metrics, "m", 0.0)
    meter.code = code
    meter.end()
    (told,) = [
        sample.labels["code"]
        for family in metrics.errors.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    ]
    assert told == label
    assert meter.code == code, "the log has it as it came"


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
    devices = [Device(index=index, name="GPU", memory_total_bytes=10 * MIB) for index in (0, 1)]
    readings = [
        DeviceHealth(
            index=0, memory_used_bytes=0, memory_free_bytes=7 * MIB, utilization_percent=50, temperature_c=60
        ),
        DeviceHealth(index=1, memory_used_bytes=0, memory_free_bytes=2 * MIB),
    ]
    told = sample_of(Fleet({"n": node_with(devices, readings)}))
    assert told("device_vram_used_mb", node="n", device="0") == 3
    assert told("device_vram_free_mb", node="n", device="1") == 2
    assert told("device_utilization_pct", node="n", device="0") == 50
    assert told("device_temp_c", node="n", device="0") == 60
    assert told("device_utilization_pct", node="n", device="1") is None


def test_the_main_memory_of_a_node_without_accelerators_is_its_device():
    told = sample_of(Fleet({"n": node_with([], [])}))
    assert told("device_vram_used_mb", node="n", device="0") == 1
    assert told("device_vram_free_mb", node="n", device="0") == 99


def test_models_are_loaded_on_their_way_or_waiting():
    node = node_with([], [])
    node.models = {
        "there": ModelInfo(id="there", status="loaded", source=""),
        "coming": ModelInfo(
            id="coming", status="loading", source="", progress=Progress(phase="weights", percent=40.0)
        ),
    }
    fleet = Fleet({"n": node}, claims={"other": Claim(since=0, node="n", num_requests=3)})
    told = sample_of(fleet)
    assert told("model_loaded", node="n", model="there") == 1
    assert told("model_loaded", node="n", model="coming") == 0
    assert told("model_load_percent", node="n", model="coming") == 40
    assert told("model_load_percent", node="n", model="there") is None
    assert told("model_waiting_requests", node="n", model="other") == 3
    assert told("node_unaccounted_bytes", node="n") == 77


def test_the_reused_share_of_a_prompt_and_its_time_in_the_queue_are_told():
    metrics = Metrics(Fleet({}))
    meter = Meter(metrics, "m", 0.0)
    meter.feed_answer(b'{"usage":{"prompt_tokens":8,"cached_tokens":6,"helexa_timing":{"queue_ms":1500.5}}}')
    meter.end()
    value = metrics.registry.get_sample_value
    labels = {"model": "m", "node": ""}
    assert value("helexa_prompt_reuse_ratio_sum", labels) == 0.75
    assert value("helexa_queue_seconds_sum", labels) == 1.5005


def test_tokens_are_counted_by_key_where_there_is_one():
    metrics = Metrics(Fleet({}))
    for key in ("", "alice", "alice"):
        meter = Meter(metrics, "m", 0.0)
        meter.key = key
        meter.feed_answer(b'{"usage":{"prompt_tokens":8,"completion_tokens":2}}')
        meter.end()
    value = metrics.registry.get_sample_value
    assert value("helexa_spend_tokens_total", {"key": "alice"}) == 20
    assert value("helexa_spend_prompt_tokens_total", {"key": "alice"}) == 16
    assert value("helexa_spend_completion_tokens_total", {"key": "alice"}) == 4
    assert value("helexa_spend_tokens_total", {"key": ""}) is None


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
