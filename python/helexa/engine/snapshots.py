"""Copies of recurrent states: where in a prompt they are taken, and which of them are kept. No tensors.

Pages bring back keys and values up to any token; a recurrent state is only known where it was copied. A
snapshot lies in a slot of the StateCache and hangs on a node of the prefix cache: it is the state after the
path to that node and the first `offset` tokens of the node itself.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helexa.engine.prefix_cache import Node

INTERVAL = 4096  # tokens between snapshots of a long prompt; at the same places in every conversation
GAP = 32  # tokens that are computed again rather than in a step of their own


@dataclass(eq=False, slots=True)
class Snapshot:
    """The state after the first `offset` tokens of `node`, in `slot`."""

    node: "Node"
    offset: int
    slot: int
    is_saved: bool = False  # given to the state store


class Snapshots:
    """A fixed number of slots; the snapshot that was not used for longest gives way to a new one."""

    def __init__(self, slots: Iterable[int], copy: Callable[[int, int], None]):
        """copy: copies the state in one slot to another."""
        self.on_evict: Callable[[Snapshot], None] | None = None
        self._copy = copy
        self._free = sorted(slots, reverse=True)
        self._kept: OrderedDict[int, Snapshot] = OrderedDict()  # by slot, the least recently used first

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    @property
    def num_slots(self) -> int:
        return len(self._kept) + len(self._free)

    def take(self, node: "Node", offset: int, slot: int) -> None:
        """Keeps the state in `slot`, which is that after `offset` tokens of the node."""
        if (known := node.snapshots.get(offset)) is not None:
            self.touch(known)
            return
        if not self._free and self._kept:
            oldest = next(iter(self._kept.values()))
            if self.on_evict is not None:
                self.on_evict(oldest)
            self.drop(oldest)
        if self._free:
            snapshot = Snapshot(node, offset, self._free.pop())
            node.snapshots[offset] = self._kept[snapshot.slot] = snapshot
            self._copy(slot, snapshot.slot)

    def restore(self, snapshot: Snapshot, slot: int) -> None:
        """Brings the state back, to `slot`."""
        self._copy(snapshot.slot, slot)

    def touch(self, snapshot: Snapshot) -> None:
        """It is used, so it stays for longer."""
        self._kept.move_to_end(snapshot.slot)

    def drop(self, snapshot: Snapshot) -> None:
        """Takes it off its node; its slot is free."""
        del self._kept[snapshot.slot], snapshot.node.snapshots[snapshot.offset]
        self._free.append(snapshot.slot)


def borders(token_ids: Sequence[int], turn_starts: Collection[int]) -> tuple[int, ...]:
    """Where prompts that begin like this one part from it, each one past the token that starts a turn.

    The end of the system prompt and the tools, the start of the last message and that of the answer. Where
    nothing starts turns, it is the last place from which the prompt can be continued.
    """
    starts = [index + 1 for index, token_id in enumerate(token_ids) if token_id in turn_starts]
    return tuple(sorted({*starts[1:2], *starts[-2:]})) or (len(token_ids) - 1,)


def cuts(
    places: Iterable[int], start: int, end: int, *, interval: int = INTERVAL, gap: int = GAP
) -> list[int]:
    """The last first, where a prompt that is computed from `start` to `end` is cut for a snapshot."""
    found: list[int] = []
    for place in sorted({*places, *range(interval, end, interval)}):
        if (found[-1] if found else start) + gap <= place < end:
            found.append(place)
    return found[::-1]
