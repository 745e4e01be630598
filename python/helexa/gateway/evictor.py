"""Who must leave when a model needs room. A pure choice; `loader` acts on it."""

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
    busy: bool = False


def displaceable(residents: Iterable[Resident], rank: int) -> list[Resident]:
    """Those that a model of class `rank` may displace: its own class and below, and nobody at work."""
    return [resident for resident in residents if resident.rank <= rank and not resident.busy]


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
