"""What Prometheus sees of the fleet: gauges read when they are asked for, as of the last poll.

So what is gone leaves no stale series, and what a neuron has not told is left out instead of being zero.
"""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from helexa.gateway.fleet import Fleet, Node
from helexa.wire.control import DeviceHealth, ModelLoad

MIB = 2**20
_MODEL_GAUGES = {
    "in_flight": "Requests that run",
    "queue_depth": "Requests that wait for a seat",
    "max_in_flight": "Seats",
    "max_queue_depth": "Places in the queue",
    "kv_tokens_used": "Positions of the KV cache in use",
    "kv_tokens_total": "Positions of the KV cache",
    "tok_s_prefill": "Recent prefill speed in tokens per second",
    "tok_s_decode": "Recent decode speed in tokens per second",
}
_MAY_BE_ZERO = ("in_flight", "queue_depth", "kv_tokens_used")  # of the others, zero means not known
_REJECTIONS = {
    "rejected_queue_full": "queue_full",
    "rejected_timeout": "wait_timeout",
    "rejected_per_principal": "per_principal",
}


class FleetCollector(Collector):
    """Nodes, their devices, and the models that are loaded, on their way or waiting."""

    def __init__(self, fleet: Fleet):
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        yield from self._nodes()
        yield from self._loads()
        yield from self._states()
        yield from self._devices()

    def _nodes(self) -> Iterator[Metric]:
        up = _gauge("node_up", "Whether the node answers", "node")
        stray = _gauge("node_unaccounted_bytes", "Memory that a neuron holds beyond its models", "node")
        for node in self._fleet.nodes.values():
            up.add_metric([node.name], float(node.healthy))
            if node.health is not None:
                stray.add_metric([node.name], node.health.unaccounted_bytes)
        yield from (up, stray)

    def _loads(self) -> Iterator[Metric]:
        reports = [(node.name, load) for node in self._fleet.nodes.values() for load in node.loads.values()]
        for name, text in _MODEL_GAUGES.items():
            gauge = _gauge(f"model_{name}", text, "node", "model")
            for node, load in reports:
                value = getattr(load, name)
                if value or name in _MAY_BE_ZERO:
                    gauge.add_metric([node, load.id], value)
            yield gauge
        yield _rejections(reports)

    def _states(self) -> Iterator[Metric]:
        loaded = _gauge("model_loaded", "Whether the model can serve", "node", "model")
        percent = _gauge("model_load_percent", "How far a load under way is", "node", "model")
        waiting = _gauge(
            "model_waiting_requests", "Requests that wait for their model's turn", "node", "model"
        )
        for node in self._fleet.nodes.values():
            for model, info in node.models.items():
                loaded.add_metric([node.name, model], float(node.is_loaded(model)))
                if info.progress is not None:
                    percent.add_metric([node.name, model], info.progress.percent)
        for model, claim in self._fleet.claims.items():
            waiting.add_metric([claim.node, model], claim.num_requests)
        yield from (loaded, percent, waiting)

    def _devices(self) -> Iterator[Metric]:
        labels = ("node", "device")
        used = _gauge("device_vram_used_mb", "Device memory in use, in MiB", *labels)
        free = _gauge("device_vram_free_mb", "Device memory free, in MiB", *labels)
        utilization = _gauge("device_utilization_pct", "Device utilization", *labels)
        temperature = _gauge("device_temp_c", "Device temperature", *labels)
        for node in self._fleet.nodes.values():
            for device in node.devices if node.health else ():
                where = [node.name, str(device.index)]
                used.add_metric(where, (device.total_bytes - device.free_bytes) / MIB)
                free.add_metric(where, device.free_bytes / MIB)
            for where, health in _readings(node):
                if health.utilization_percent is not None:
                    utilization.add_metric(where, health.utilization_percent)
                if health.temperature_c is not None:
                    temperature.add_metric(where, health.temperature_c)
        yield from (used, free, utilization, temperature)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"helexa_{name}", text, labels=labels)


def _rejections(reports: list[tuple[str, ModelLoad]]) -> Metric:
    labels = ["node", "model", "reason"]
    refused = CounterMetricFamily("helexa_model_rejections", "Requests that neurons refused", labels=labels)
    for node, load in reports:
        for name, reason in _REJECTIONS.items():
            refused.add_metric([node, load.id, reason], getattr(load, name))
    return refused


def _readings(node: Node) -> Iterator[tuple[list[str], DeviceHealth]]:
    for health in node.health.devices if node.health else ():
        yield [node.name, str(health.index)], health
