"""Prometheus metrics of a neuron, in a registry of their own so that several can live in one process."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from helexa.engine.state_store import StateStore
from helexa.wire.control import ModelLoad

CONTENT_TYPE = CONTENT_TYPE_LATEST
_REQUEST_S = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)
_FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120)
_INTER_TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
_REUSE = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
_LOAD_S = (0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640)


@dataclass(frozen=True)
class Tokens:
    """What one request has cost; cached tokens are among those of the prompt."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class _LoadCollector(Collector):
    """Gauges read from the models when they are scraped, so that an unloaded model leaves no stale series."""

    def __init__(self, read: Callable[[], Iterable[ModelLoad]]):
        self._read = read

    def collect(self) -> Iterator[Metric]:
        loads = list(self._read())
        for name, text in (
            ("in_flight", "Seats taken by running requests."),
            ("queue_depth", "Requests that wait for a seat."),
            ("max_in_flight", "Seats."),
            ("max_queue_depth", "Places in the queue."),
            ("kv_tokens_used", "Positions of the KV cache in use."),
            ("kv_tokens_total", "Positions of the KV cache."),
            ("kv_tokens_cached", "Positions of the KV cache that only the prefix cache keeps."),
            ("snapshots_used", "Kept states of recurrent layers."),
            ("snapshots_total", "Places for such states."),
            ("tok_s_prefill", "Recent prefill speed in tokens per second."),
            ("tok_s_decode", "Recent decode speed in tokens per second."),
        ):
            gauge = GaugeMetricFamily(f"helexa_neuron_model_{name}", text, labels=["model"])
            for load in loads:
                gauge.add_metric([load.id], getattr(load, name))
            yield gauge
        rejections = CounterMetricFamily(
            "helexa_neuron_rejections", "Requests sent away by admission.", labels=["model", "reason"]
        )
        for load in loads:
            rejections.add_metric([load.id, "queue_full"], load.rejected_queue_full)
            rejections.add_metric([load.id, "wait_timeout"], load.rejected_timeout)
            rejections.add_metric([load.id, "per_principal"], load.rejected_per_principal)
        yield rejections
        stored = CounterMetricFamily(
            "helexa_neuron_stored_prompt_tokens", "Prompt tokens from the state store.", labels=["model"]
        )
        for load in loads:
            stored.add_metric([load.id], load.stored_tokens)
        yield stored


class _StoreCollector(Collector):
    """What the state store holds; no samples where there is none."""

    def __init__(self, store: StateStore | None):
        self._store = store

    def collect(self) -> Iterator[Metric]:
        for attribute, name, text in (
            ("num_entries", "entries", "Parts of caches in the state store."),
            ("held_bytes", "host_bytes", "Main memory that the state store holds."),
            ("disk_bytes", "disk_bytes", "Bytes of the state store's files."),
        ):
            gauge = GaugeMetricFamily(f"helexa_neuron_state_store_{name}", text, labels=[])
            if self._store is not None:
                gauge.add_metric([], getattr(self._store, attribute))
            yield gauge
        damaged = CounterMetricFamily(
            "helexa_neuron_state_store_damaged", "Files that could not be read again.", labels=[]
        )
        if self._store is not None:
            damaged.add_metric([], self._store.num_damaged)
        yield damaged


class Metrics:
    """Counters and histograms, each with the label `model`; an unknown model counts under the empty name."""

    def __init__(self, read_loads: Callable[[], Iterable[ModelLoad]] = list, store: StateStore | None = None):
        self._registry = CollectorRegistry()
        self._registry.register(_LoadCollector(read_loads))
        self._registry.register(_StoreCollector(store))
        self.tasks = Gauge("helexa_neuron_tasks", "Tasks of the event loop.", registry=self._registry)
        self.faults = Counter(
            "helexa_neuron_device_faults", "Faults of a device.", ["device"], registry=self._registry
        )

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"helexa_neuron_{name}", text, ["model", *labels], registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"helexa_neuron_{name}", text, ["model"], buckets=buckets, registry=self._registry
            )

        self.requests = counter("requests", "Generating requests.", "route")
        self.errors = counter("request_errors", "Generating requests that failed.", "code")
        self.cancelled = counter("requests_cancelled", "Generating requests whose client left.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens.")
        self.cached_tokens = counter("cached_prompt_tokens", "Prompt tokens taken from the prefix cache.")
        self.completion_tokens = counter("completion_tokens", "Generated tokens.")
        self.loads = counter("model_loads", "Model loads.", "result")
        self.unloads = counter("model_unloads", "Model unloads.")
        self.duration = histogram("request_duration_seconds", "Whole requests.", _REQUEST_S)
        self.first_token = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN_S
        )
        self.reuse = histogram("prompt_reuse_ratio", "Share of a prompt that was cached.", _REUSE)
        self.inter_token = histogram("inter_token_seconds", "Between tokens of one answer.", _INTER_TOKEN_S)
        self.load_seconds = histogram("model_load_seconds", "Successful loads.", _LOAD_S)

    def count_request(self, route: str, model: str, outcome: str, duration_s: float, tokens: Tokens) -> None:
        """Adds one request that has ended; `outcome` is "ok", "cancelled" or the code of its error."""
        self.requests.labels(model, route).inc()
        if outcome == "cancelled":
            self.cancelled.labels(model).inc()
        elif outcome != "ok":
            self.errors.labels(model, outcome).inc()
        else:
            self.duration.labels(model).observe(duration_s)
        self.prompt_tokens.labels(model).inc(tokens.prompt_tokens)
        if outcome == "ok" and tokens.completion_tokens:
            self.reuse.labels(model).observe(tokens.cached_tokens / max(tokens.prompt_tokens, 1))
        self.cached_tokens.labels(model).inc(tokens.cached_tokens)
        self.completion_tokens.labels(model).inc(tokens.completion_tokens)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)
