"""Who must leave when a model needs room, and when. Pure choices; `loader` acts on them.

Two models that take turns on one node would be loaded anew for every request if each displaced the other at
once. So a model that has just been loaded keeps its place for a turn, while another waits; it gives it up
earlier when no request has come for as long as loading it again would take: who waits longer than that loses
more than a swap costs, who waits less may swap back and forth. After the turn the first idle moment ends it;
when there is none, new requests are held back until there is.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Strategy = Literal["priority", "lru"]


@dataclass(frozen=True)
class Resident:
    """A model loaded on the node in question."""

    model: str
    rank: int
    memory_bytes: int
    last_used: float
    is_kept: bool = False  # at work, or within its turn


def is_within_turn(
    now: float, loaded_since: float | None, last_used: float | None, load_s: float, turn_s: float
) -> bool:
    """Whether an idle model, loaded at `loaded_since`, still keeps its place from another that waits."""
    if loaded_since is None or now - loaded_since >= turn_s:
        return False
    return now - max(loaded_since, last_used or loaded_since) < min(load_s, turn_s)


def displaceable(residents: Iterable[Resident], rank: int) -> list[Resident]:
    """Those that a model of class `rank` may displace: its own class and below, and nobody who is kept."""
    return [resident for resident in residents if resident.rank <= rank and not resident.is_kept]


def victims(
    residents: Iterable[Resident], needed_bytes: int, rank: int, strategy: Strategy = "priority"
) -> tuple[str, ...] | None:
    """The models to unload, in order, to free `needed_bytes`; None if all that may go is not enough.

    priority: the lowest class first, the least recently used within it. lru: the least recently used whatever
    its class. Nobody is named without need: a resident whose room turns out not to be needed stays.
    """
    if needed_bytes <= 0:
        return ()
    order = sorted(
        displaceable(residents, rank),
        key=lambda resident: (
            resident.rank if strategy == "priority" else 0,
            resident.last_used,
            resident.model,
        ),
    )
    chosen: list[Resident] = []
    freed = 0
    for resident in order:
        if freed >= needed_bytes:
            break
        if resident.memory_bytes > 0:
            chosen.append(resident)
            freed += resident.memory_bytes
    if freed < needed_bytes:
        return None
    for resident in reversed(chosen.copy()):  # the ones most worth keeping first
        if freed - resident.memory_bytes >= needed_bytes:
            chosen.remove(resident)
            freed -= resident.memory_bytes
    return tuple(resident.model for resident in chosen)
