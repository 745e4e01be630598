"""What the gateway knows of its neurons: plain data that others write and the router reads.

A neuron's own word (status, load, memory) is as old as its last poll; what this gateway runs is exact.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ssl import SSLContext
from typing import Literal

from helexa.errors import HelexaError
from helexa.wire.control import Discovery, Health, ModelInfo, ModelLoad, Progress

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
    """One neuron, or another server that speaks the OpenAI API, whose models come and go without us."""

    name: str
    endpoint: str
    headers: Mapping[str, str] = field(default_factory=dict)  # that show it who we are
    ssl: SSLContext | bool = True  # whom we believe to be it, if it speaks https
    kind: Literal["neuron", "openai"] = "neuron"
    offers: tuple[str, ...] = ()  # of kind openai: those of its models to use; all if empty
    healthy: bool = False  # never seen is not healthy
    suspect: bool = False  # a request could not reach it; the next poll decides
    tripped: bool = False  # requests have failed there again and again; for a while others are preferred
    failures: int = 0
    error: str | None = None  # of the last poll
    discovery: Discovery | None = None
    health: Health | None = None
    models: dict[str, ModelInfo] = field(default_factory=dict)
    loads: dict[str, ModelLoad] = field(default_factory=dict)
    active: Counter[str] = field(default_factory=Counter)  # requests of this gateway, by model
    active_at_poll: Counter[str] = field(default_factory=Counter)
    last_used: dict[str, float] = field(default_factory=dict)  # monotonic seconds
    loaded_since: dict[str, float] = field(
        default_factory=dict
    )  # monotonic; of what was loaded before us, absent
    load_seconds: dict[str, float] = field(
        default_factory=dict
    )  # what loading took last, also of those now gone
    seen: dict[str, ModelInfo] = field(default_factory=dict)  # models as they were when last loaded
    displaced: dict[str, ModelInfo] = field(
        default_factory=dict
    )  # models that had to leave, until they are back
    unloads: int = 0  # since its memory was last looked at

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

    def knows(self, model: str) -> bool:
        """Whether the model is there, or could be loaded there without a word from the catalogue."""
        return model in self.models or model in self.displaced

    def begin(self, model: str, now: float) -> None:
        """A request for the model goes there."""
        self.active[model] += 1
        self.last_used[model] = now

    def end(self, model: str, now: float) -> None:
        """It has ended."""
        self.active[model] -= 1
        self.last_used[model] = now

    def progress(self, model: str) -> Progress:
        """How far the load of the model is, as of the last poll."""
        info = self.models.get(model)
        return (info.progress if info else None) or Progress(phase="queued", percent=0.0)

    def busy(self, model: str) -> int:
        """Requests running or queued: this gateway's own now, others' as of the last poll."""
        load = self.loads.get(model)
        polled = load.in_flight + load.queue_depth if load else 0
        return self.active[model] + max(0, polled - self.active_at_poll[model])


@dataclass
class Claim:
    """A model that waits for its turn on a node where others are loaded. Times are monotonic seconds."""

    since: float
    node: str = ""
    displaces: tuple[str, ...] = ()  # these have had their turn: they get no new requests on the node
    due_since: float | None = None
    num_requests: int = 0  # that wait for it; those that would not wait are expected to come back
    asked_at: float = 0.0

    def follow(self, node: str, displaced: tuple[str, ...], is_due: bool, now: float) -> None:
        """Notes what the router has found."""
        self.node = node
        self.displaces = displaced if is_due else ()
        if not is_due:
            self.due_since = None
        elif self.due_since is None:
            self.due_since = now

    def is_spent(self, now: float, room_wait_s: float) -> bool:
        """Whether the others have been at work for too long for it to go on holding them up."""
        return self.due_since is not None and now - self.due_since >= room_wait_s


@dataclass
class Fleet:
    """All neurons, the loads that this gateway has under way or has seen fail, and who waits for a turn."""

    nodes: dict[str, Node]
    loading: dict[str, str] = field(default_factory=dict)  # model → node
    recovering: set[str] = field(default_factory=set)  # those of `loading` that failed on their device
    claims: dict[str, Claim] = field(default_factory=dict)  # by model
    failed: dict[tuple[str, str], HelexaError] = field(
        default_factory=dict
    )  # (node, model) → why; forgotten in time

    def routable(self) -> Iterator[Node]:
        return (node for node in self.nodes.values() if node.routable)

    def is_yielding(self, node: Node, model: str) -> bool:
        """Whether the model must give up its place on the node as soon as its requests have ended."""
        return any(claim.node == node.name and model in claim.displaces for claim in self.claims.values())
