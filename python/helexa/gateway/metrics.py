"""What Prometheus sees of requests: their times, tokens, loads and evictions. Docs: docs/metrics.md."""

import re
import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from helexa.errors import error_codes
from helexa.gateway.fleet import Fleet
from helexa.gateway.fleet_metrics import FleetCollector

_DURATIONS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)
_FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120)
_INTER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_QUEUE = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
_RATES = (1, 2.5, 5, 10, 15, 20, 30, 40, 60, 80, 120, 200)

_CONTENT = re.compile(rb'"(?:content|text|reasoning_content|arguments)": ?"[^"]')
_QUEUE_MS = re.compile(rb'"queue_ms": ?([\d.]+)')
CLIENT_CLOSED = "client_closed_request"  # the code of a request whose client left before its answer had ended
OTHER_CODE = "other"  # of errors that are not ours, whose names would make labels without end
_CODES = error_codes() | {CLIENT_CLOSED}
_USAGE = {
    name: re.compile(rb'"%s": ?(\d+)' % name.encode())
    for name in ("prompt_tokens", "completion_tokens", "cached_tokens")
}


class Metrics:
    """Every counter and histogram, in a registry of its own."""

    def __init__(self, fleet: Fleet):
        self.registry = CollectorRegistry()
        where = ("model", "node")

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"helexa_{name}", text, (*where, *more), registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"helexa_{name}", text, where, registry=self.registry, buckets=buckets)

        self.requests = counter("requests", "Inference requests that have ended, failed ones included")
        self.errors = counter("request_errors", "Inference requests that failed, by error code", "code")
        self.cold_starts = counter("cold_starts", "Requests that waited for their model to be loaded")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens")
        self.completion_tokens = counter("completion_tokens", "Generated tokens")
        self.cached_tokens = counter("cached_prompt_tokens", "Prompt tokens found in the prefix cache")
        self.spend = {
            name: Counter(f"helexa_spend_{name}", f"{text} of each API key", ("key",), registry=self.registry)
            for name, text in (
                ("tokens", "Tokens"),
                ("prompt_tokens", "Prompt tokens"),
                ("completion_tokens", "Generated tokens"),
            )
        }
        self.loads = counter("loads", "Loads that the gateway asked for, by outcome", "outcome")
        self.swaps = counter("swaps", "Loads for which other models had to leave")
        self.evictions = counter(
            "evictions", "Models unloaded to make room, or because nobody asked", "reason"
        )
        self.defrags = Counter(
            "helexa_defrags",
            "Times that a node loaded its models anew to give memory back",
            ("node",),
            registry=self.registry,
        )
        self.duration = histogram(
            "request_duration_seconds", "From arrival to the end of the answer", _DURATIONS
        )
        self.first_token = histogram(
            "time_to_first_token_seconds", "From arrival to the first text", _FIRST_TOKEN
        )
        self.inter_token = histogram("inter_token_seconds", "Between chunks of text", _INTER_TOKEN)
        self.token_rate = histogram("tokens_per_second", "Of each answer, after its first token", _RATES)
        self.queue_time = histogram("queue_seconds", "In the queue of the neuron's engine", _QUEUE)
        self.reuse = histogram(
            "prompt_reuse_ratio", "Share of a prompt that was found in the prefix cache", _SHARES
        )
        self.load_time = histogram("load_seconds", "Loads that succeeded", _DURATIONS)
        self.model_wait = histogram(
            "model_wait_seconds", "Of requests that waited for a load or for their model's turn", _DURATIONS
        )
        self.tasks = Gauge("helexa_tasks", "Tasks of the gateway's event loop", registry=self.registry)
        self.registry.register(FleetCollector(fleet))


class Meter:
    """Times and counts of one request. `feed` is on the hot path: no parsing, a byte search at most."""

    def __init__(self, metrics: Metrics, model: str, started: float):
        self.model = model
        self.node = ""
        self.key = ""  # the id of the API key's principal
        self.started = started
        self.first_token_s: float | None = None
        self.usage: dict[str, int] = {}
        self.completion_tokens = 0  # as told, or counted where nobody told; known once ended
        self.code: str | None = None
        self._metrics = metrics
        self._inter_token: Histogram | None = None
        self._last = 0.0
        self._events = 0
        self._tail: deque[bytes] = deque(maxlen=4)

    def feed(self, block: bytes) -> None:
        """Some whole events of a stream, or all of an answer that is not one."""
        self._tail.append(block)
        if self._inter_token is None:
            if _CONTENT.search(block):
                self._last = time.perf_counter()
                self.first_token_s = self._last - self.started
                self._inter_token = self._metrics.inter_token.labels(self.model, self.node)
                self._events = 1
        elif events := block.count(b"data: "):
            now = time.perf_counter()
            self._inter_token.observe((now - self._last) / events)
            self._last = now
            self._events += events

    def feed_answer(self, body: bytes) -> None:
        """All of an answer that is not a stream."""
        self._tail.append(body)

    @property
    def tail(self) -> bytes:
        """The last events."""
        return b"".join(self._tail)

    def end(self) -> None:
        """Called once, however the request ended; `code` is its error if it failed."""
        metrics, where = self._metrics, (self.model, self.node)
        now = time.perf_counter()
        tail = self.tail
        for name, pattern in _USAGE.items():
            if found := pattern.findall(tail):
                self.usage[name] = int(found[-1])
        metrics.requests.labels(*where).inc()
        if self.code is not None:
            metrics.errors.labels(*where, self.code if self.code in _CODES else OTHER_CODE).inc()
        metrics.duration.labels(*where).observe(now - self.started)
        # A stream that broke off has told no usage; then events count for tokens.
        self.completion_tokens = completion = self.usage.get("completion_tokens", self._events)
        metrics.completion_tokens.labels(*where).inc(completion)
        if prompt := self.usage.get("prompt_tokens", 0):
            cached = self.usage.get("cached_tokens", 0)
            metrics.prompt_tokens.labels(*where).inc(prompt)
            metrics.cached_tokens.labels(*where).inc(cached)
            metrics.reuse.labels(*where).observe(cached / prompt)
        if queued := _QUEUE_MS.findall(tail):
            metrics.queue_time.labels(*where).observe(float(queued[-1]) / 1e3)
        if self.key:
            metrics.spend["tokens"].labels(self.key).inc(prompt + completion)
            metrics.spend["prompt_tokens"].labels(self.key).inc(prompt)
            metrics.spend["completion_tokens"].labels(self.key).inc(completion)
        if self.first_token_s is not None:
            metrics.first_token.labels(*where).observe(self.first_token_s)
            elapsed = self._last - self.started - self.first_token_s
            if completion > 1 and elapsed > 0:
                metrics.token_rate.labels(*where).observe((completion - 1) / elapsed)
