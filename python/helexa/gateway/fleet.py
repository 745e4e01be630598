"""What the gateway knows about its neurons: plain data that poller and proxy write and the router reads.

A neuron's own word (status, load, memory) is as old as its last poll; what this gateway runs is exact.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from helexa.errors import HelexaError
from helexa.wire.control import Discovery, Health, ModelInfo, ModelLoad

FAILURES_UNTIL_UNHEALTHY = 3


@dataclass
class Device:
    """Something that models are loaded on; the main memory of a node without accelerators counts as one."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int


@dataclass
class Node:
    """One neuron."""

    name: str
    endpoint: str
    healthy: bool = False  # never seen is not healthy
    suspect: bool = False  # a request could not reach it; the next poll decides
    failures: int = 0
    error: str | None = None  # of the last poll
    discovery: Discovery | None = None
    health: Health | None = None
    models: dict[str, ModelInfo] = field(default_factory=dict)
    loads: dict[str, ModelLoad] = field(default_factory=dict)
    active: Counter[str] = field(default_factory=Counter)  # requests of this gateway, by model
    active_at_poll: Counter[str] = field(default_factory=Counter)
    last_used: dict[str, float] = field(default_factory=dict)  # monotonic seconds

    @property
    def routable(self) -> bool:
        """Whether new requests may go there."""
        return self.healthy and not self.suspect and not self.draining

    @property
    def draining(self) -> bool:
        return self.health is not None and self.health.status == "draining"

    @property
    def devices(self) -> list[Device]:
        """The devices with their memory as of the last poll."""
        if self.discovery is None:
            return []
        if not self.discovery.devices:
            cpu = self.discovery.cpu
            free = self.health.memory_available_bytes if self.health else cpu.memory_total_bytes
            return [Device(0, cpu.name, cpu.memory_total_bytes, free)]
        free_by_index = (
            {device.index: device.memory_free_bytes for device in self.health.devices} if self.health else {}
        )
        return [
            Device(device.index, device.name, device.memory_total_bytes, free_by_index.get(device.index, 0))
            for device in self.discovery.devices
        ]

    def is_loaded(self, model: str) -> bool:
        """Whether a request for the model would be served at once."""
        info = self.models.get(model)
        if info is None or info.status != "loaded":
            return False
        load = self.loads.get(model)
        return load is None or load.poisoned is None

    def busy(self, model: str) -> int:
        """Requests running or queued: this gateway's own now, others' as of the last poll."""
        load = self.loads.get(model)
        polled = load.in_flight + load.queue_depth if load else 0
        return self.active[model] + max(0, polled - self.active_at_poll[model])


@dataclass
class Fleet:
    """All neurons, and the loads that this gateway has under way or has seen fail."""

    nodes: dict[str, Node]
    loading: dict[str, str] = field(default_factory=dict)  # model → node
    failed: dict[tuple[str, str], HelexaError] = field(
        default_factory=dict
    )  # (node, model) → why; forgotten in time

    def routable(self) -> Iterator[Node]:
        return (node for node in self.nodes.values() if node.routable)
