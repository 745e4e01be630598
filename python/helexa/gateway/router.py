"""Which neuron serves a request: a pure function over the fleet as it is known now."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from helexa.errors import CannotHost, NoPlacement, Unavailable, UnknownModel
from helexa.gateway.catalogue import Catalogue, ModelEntry
from helexa.gateway.evictor import Resident, Strategy, victims
from helexa.gateway.fleet import Fleet, Node


@dataclass(frozen=True)
class Decision:
    """What to do with a request.

    serve: the model is loaded there. join: it is being loaded there. load: unload `evict`, then load it.
    recover: it has failed on its device there; refuse for now and load it again.
    """

    action: Literal["serve", "join", "load", "recover"]
    node: str
    model: str
    evict: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Placement:
    node: Node
    pinned: bool
    free_bytes: int
    evict: tuple[str, ...] | None  # None: cannot be made to fit now


def choose(
    fleet: Fleet,
    catalogue: Catalogue,
    model: str,
    *,
    avoid: Collection[str] = (),
    strategy: Strategy = "priority",
) -> Decision:
    """Where the model (an id, not an alias) shall be served. avoid: nodes that this request has tried.

    Raises UnknownModel, Unavailable (no node up), NoPlacement (no room now), CannotHost (never), or what made
    the last load fail.
    """
    loaded = [node for node in fleet.routable() if node.is_loaded(model) and node.name not in avoid]
    if loaded:
        best = min(loaded, key=lambda node: (node.busy(model), node.name))
        return Decision("serve", best.name, model)
    if joined := _under_way(fleet, model, avoid):
        return Decision("join", joined, model)
    for node in fleet.routable():
        if _is_broken(node, model) and (node.name, model) not in fleet.failed:
            return Decision("recover", node.name, model)
    return _place(fleet, catalogue, model, avoid, strategy)


def _under_way(fleet: Fleet, model: str, avoid: Collection[str]) -> str | None:
    """The node where the model is being loaded, by this gateway or by somebody else."""
    for node in fleet.routable():
        info = node.models.get(model)
        is_loading = fleet.loading.get(model) == node.name or (info is not None and info.status == "loading")
        if is_loading and node.name not in avoid and (node.name, model) not in fleet.failed:
            return node.name
    return None


def _is_broken(node: Node, model: str) -> bool:
    info = node.models.get(model)
    if info is None:
        return False
    return info.status == "poisoned" or (info.status == "loaded" and not node.is_loaded(model))


def _place(
    fleet: Fleet, catalogue: Catalogue, model: str, avoid: Collection[str], strategy: Strategy
) -> Decision:
    entry = catalogue.models.get(model)
    known_by = [node for node in fleet.nodes.values() if model in node.models]
    if not any(fleet.routable()):
        raise Unavailable("no neuron is reachable", retry_after_s=5)
    if entry is None and not known_by:
        raise UnknownModel(f"model {model!r} is not known here; GET /v1/models lists what is", param="model")
    hosts = [node for node in fleet.nodes.values() if is_feasible(node, entry)] if entry else known_by
    open_hosts = [node for node in hosts if node.routable and node.name not in avoid]
    if not open_hosts:
        raise _no_host(fleet, entry, model, hosts)
    candidates = [node for node in open_hosts if (node.name, model) not in fleet.failed]
    if not candidates:
        raise fleet.failed[open_hosts[0].name, model]
    entry = entry or ModelEntry(id=model)
    placements = [_placement(fleet, catalogue, node, entry, strategy) for node in candidates]
    best = min(placements, key=_preference)
    if best.evict is None:
        raise NoPlacement(
            f"model {model!r} needs {entry.vram_mb} MiB; {best.node.name} has {best.free_bytes >> 20} MiB "
            "free, and unloading what may be displaced now would not make enough room"
        )
    return Decision("load", best.node.name, model, best.evict)


def _no_host(fleet: Fleet, entry: ModelEntry | None, model: str, hosts: list[Node]) -> Unavailable:
    unseen = [
        node for node in fleet.nodes.values() if node.discovery is None and entry and _may_pin(node, entry)
    ]
    if hosts or unseen:
        down = ", ".join(sorted(node.name for node in hosts or unseen))
        return Unavailable(f"model {model!r} could be served by {down}, not reachable now", retry_after_s=3)
    return CannotHost(f"no node of this fleet can host model {model!r}")


def is_feasible(node: Node, entry: ModelEntry) -> bool:
    """Whether the node's hardware, all of it empty, could hold the model."""
    if not _may_pin(node, entry):
        return False
    totals = [d.total_bytes for d in node.devices if d.total_bytes >= entry.min_device_vram_mb * 2**20]
    return len(totals) >= entry.min_devices and _largest(totals, entry) >= entry.need_bytes


def _may_pin(node: Node, entry: ModelEntry) -> bool:
    return not entry.pinned_on or node.name in entry.pinned_on


def _largest(sizes: list[int], entry: ModelEntry) -> int:
    """Memory in as many devices as the model is spread over."""
    return sum(sorted(sizes, reverse=True)[: entry.min_devices])


def _placement(
    fleet: Fleet, catalogue: Catalogue, node: Node, entry: ModelEntry, strategy: Strategy
) -> _Placement:
    minimum = entry.min_device_vram_mb * 2**20
    free = _largest([d.free_bytes for d in node.devices if d.total_bytes >= minimum], entry)
    free -= sum(_need(catalogue, other) for other, host in fleet.loading.items() if host == node.name)
    residents = _residents(node, catalogue)
    evict = victims(residents, entry.need_bytes - free, entry.rank, strategy)
    return _Placement(node, node.name in entry.pinned_on, free, evict)


def _need(catalogue: Catalogue, model: str) -> int:
    entry = catalogue.models.get(model)
    return entry.need_bytes if entry else 0


def _residents(node: Node, catalogue: Catalogue) -> Iterator[Resident]:
    for model, info in node.models.items():
        if info.status in ("loaded", "poisoned"):
            yield Resident(
                model,
                catalogue.rank(model),
                info.memory_bytes or _need(catalogue, model),
                node.last_used.get(model, 0.0),
                busy=node.busy(model) > 0,
            )


def _preference(placement: _Placement) -> tuple[bool, bool, bool, int, str]:
    """Smallest is best: pinned here, fits as it is, fits after eviction, most free memory, name."""
    fits = placement.evict == ()
    return (
        not placement.pinned,
        not fits,
        placement.evict is None,
        -placement.free_bytes,
        placement.node.name,
    )
