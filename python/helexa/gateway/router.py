"""Which neuron serves a request: a pure function over the fleet as it is known now."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from helexa.errors import CannotHost, NoPlacement, Unavailable, UnknownModel
from helexa.gateway.catalogue import Catalogue, ModelEntry
from helexa.gateway.config import EvictionSection
from helexa.gateway.evictor import Resident, is_within_turn, victims
from helexa.gateway.fleet import Fleet, Node


@dataclass(frozen=True)
class Decision:
    """What to do with a request.

    serve: the model is loaded there. join: it is being loaded there. load: unload `evict`, then load it.
    recover: it has failed on its device there; refuse for now and load it again. wait: its turn there comes
    after that of `evict`; if it is due, these get no new requests until it has come.
    """

    action: Literal["serve", "join", "load", "recover", "wait"]
    node: str
    model: str
    evict: tuple[str, ...] = ()
    is_due: bool = False


@dataclass(frozen=True)
class _Placement:
    node: Node
    pinned: bool
    free_bytes: int
    evict: tuple[str, ...] | None  # None: cannot be made to fit now
    waits_for: tuple[str, ...] | None = (
        None  # who must have had their turn; None: cannot be made to fit at all
    )
    is_due: bool = False


def choose(
    fleet: Fleet,
    catalogue: Catalogue,
    model: str,
    *,
    now: float = 0.0,
    avoid: Collection[str] = (),
    eviction: EvictionSection = EvictionSection(),  # noqa: B008  frozen
) -> Decision:
    """Where the model (an id, not an alias) shall be served. avoid: nodes that this request has tried.

    now: monotonic seconds, of which the claims and turns in `fleet` tell. Raises UnknownModel, Unavailable
    (no node up), NoPlacement (no room now), CannotHost (never), or what made the last load fail.
    """
    replicas = [node for node in fleet.routable() if node.is_loaded(model) and node.name not in avoid]
    loaded = [node for node in replicas if not fleet.is_yielding(node, model)] if fleet.claims else replicas
    if loaded:
        best = min(loaded, key=lambda node: (node.tripped, node.busy(model), node.name))
        return Decision("serve", best.name, model)
    if model in fleet.recovering:
        return Decision("recover", fleet.loading[model], model)
    if joined := _under_way(fleet, model, avoid):
        return Decision("join", joined, model)
    for node in fleet.routable():
        if _is_broken(node, model) and (node.name, model) not in fleet.failed:
            return Decision("recover", node.name, model)
    if replicas:
        return Decision("wait", replicas[0].name, model)
    return _place(fleet, catalogue, model, now, avoid, eviction)


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
    fleet: Fleet,
    catalogue: Catalogue,
    model: str,
    now: float,
    avoid: Collection[str],
    eviction: EvictionSection,
) -> Decision:
    entry = catalogue.models.get(model)
    known_by = [node for node in fleet.nodes.values() if node.knows(model)]
    if not any(fleet.routable()):
        raise Unavailable("no neuron is reachable", retry_after_s=5)
    if entry is None and not known_by:
        raise UnknownModel(f"model {model!r} is not known here; GET /v1/models lists what is", param="model")
    hosts = [node for node in fleet.nodes.values() if is_feasible(node, entry)] if entry else known_by
    open_hosts = [
        node for node in hosts if node.routable and node.kind == "neuron" and node.name not in avoid
    ]
    if not open_hosts:
        raise _no_host(fleet, entry, model, hosts)
    candidates = [node for node in open_hosts if (node.name, model) not in fleet.failed]
    if not candidates:
        raise fleet.failed[open_hosts[0].name, model]
    entry = entry or ModelEntry(id=model, vram_mb=_remembered_mb(known_by, model))
    rules = _Rules(fleet, catalogue, now, eviction)
    best = min((rules.placement(node, entry) for node in candidates), key=_preference)
    if best.evict is not None:
        return Decision("load", best.node.name, model, best.evict)
    if best.waits_for is not None:
        return Decision("wait", best.node.name, model, best.waits_for, best.is_due)
    raise NoPlacement(
        f"model {model!r} needs {entry.vram_mb} MiB; {best.node.name} has {best.free_bytes >> 20} MiB "
        "free, and unloading what may be displaced would not make enough room"
    )


def _remembered_mb(nodes: list[Node], model: str) -> int:
    """What a model that had to leave took then, in MiB."""
    sizes = (node.displaced[model].memory_bytes or 0 for node in nodes if model in node.displaced)
    return -(-max(sizes, default=0) // 2**20)


def _no_host(fleet: Fleet, entry: ModelEntry | None, model: str, hosts: list[Node]) -> Unavailable:
    unseen = [
        node
        for node in fleet.nodes.values()
        if node.kind == "neuron" and node.discovery is None and entry and _may_pin(node, entry)
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


@dataclass(frozen=True)
class _Rules:
    """Who may displace whom, and when."""

    fleet: Fleet
    catalogue: Catalogue
    now: float
    eviction: EvictionSection

    def placement(self, node: Node, entry: ModelEntry) -> _Placement:
        minimum = entry.min_device_vram_mb * 2**20
        free = _largest([d.free_bytes for d in node.devices if d.total_bytes >= minimum], entry)
        coming = [model for model, host in self.fleet.loading.items() if host == node.name]
        free -= sum(self._need(model) for model in coming)
        found = _Placement(node, node.name in entry.pinned_on, free, None)
        residents = list(self._residents(node))
        missing = entry.need_bytes - free
        at_last = self._victims([*residents, *(self._arriving(model) for model in coming)], missing, entry)
        if at_last is None:
            return found
        is_due = self._is_due(node, entry.id, at_last, coming)
        kept = [replace(one, is_kept=self._is_kept(node, one, entry, is_due)) for one in residents]
        evict = victims(kept, missing, entry.rank, self.eviction.strategy)
        if evict and self._is_behind(node, entry):
            evict, is_due = None, False
        return replace(found, evict=evict, waits_for=at_last, is_due=is_due)

    def _victims(self, residents: list[Resident], missing: int, entry: ModelEntry) -> tuple[str, ...] | None:
        return victims(residents, missing, entry.rank, self.eviction.strategy)

    def _residents(self, node: Node) -> Iterator[Resident]:
        for model, info in node.models.items():
            if info.status in ("loaded", "poisoned"):
                size = info.memory_bytes or self._need(model)
                yield Resident(model, self.catalogue.rank(model), size, node.last_used.get(model, 0.0))

    def _arriving(self, model: str) -> Resident:
        return Resident(model, self.catalogue.rank(model), self._need(model), self.now)

    def _need(self, model: str) -> int:
        entry = self.catalogue.models.get(model)
        return entry.need_bytes if entry else 0

    def _is_due(self, node: Node, model: str, displaced: tuple[str, ...], coming: list[str]) -> bool:
        """Whether the model has waited for a whole turn of those that it displaces."""
        claim = self.fleet.claims.get(model)
        if claim is None or any(other in coming for other in displaced):
            return False
        begun = max((claim.since, *(node.loaded_since.get(other, claim.since) for other in displaced)))
        return self.now - begun >= self.eviction.turn_s

    def _is_kept(self, node: Node, resident: Resident, entry: ModelEntry, is_due: bool) -> bool:
        model = resident.model
        if node.busy(model):  # a higher class that has waited for a turn goes first, whatever is at work
            return not (is_due and entry.rank > resident.rank)
        if is_due or not node.is_loaded(model):
            return False
        return is_within_turn(
            self.now,
            node.loaded_since.get(model),
            node.last_used.get(model),
            node.load_seconds.get(model, 0.0),
            self.eviction.turn_s,
        )

    def _is_behind(self, node: Node, entry: ModelEntry) -> bool:
        """Whether another model of at least this class has waited longer for its turn there."""
        own = self.fleet.claims.get(entry.id)
        since = own.since if own else self.now
        return any(
            claim.node == node.name and claim.since < since and self.catalogue.rank(model) >= entry.rank
            for model, claim in self.fleet.claims.items()
            if model != entry.id
        )


def _preference(placement: _Placement) -> tuple[bool, bool, bool, bool, bool, int, str]:
    """Smallest is best: works, pinned here, fits as it is, after eviction, in its turn, most free, name."""
    return (
        placement.node.tripped,
        not placement.pinned,
        placement.evict != (),
        placement.evict is None,
        placement.waits_for is None,
        -placement.free_bytes,
        placement.node.name,
    )
