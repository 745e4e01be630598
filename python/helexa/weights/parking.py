"""Weights of models that have left a device, kept in main memory as they lay there.

So a model that comes back is one copy, whatever it was read or quantized from. For any thread.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from helexa import ops
from helexa.log import fields

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where bytes lie in the memory of a model's weights."""

    first: int
    nbytes: int

    def of(self, memory: Tensor) -> Tensor:
        """These bytes of it."""
        return memory[self.first : self.first + self.nbytes]


@dataclass(frozen=True)
class ParkedMatrix:
    """A weight matrix; `place` has its bytes."""

    format: str
    rows: int
    cols: int
    place: Place


@dataclass(frozen=True)
class ParkedWeights:
    """What was the memory of a model's weights, and what lies where in it.

    matrices: by name and blocks of rows.   vectors: by name, with their shapes.   tables: by name, what
    was in main memory all the time.
    """

    memory: Tensor  # [nbytes] uint8
    matrices: Mapping[tuple[str, ops.RowBlocks | None], ParkedMatrix]
    vectors: Mapping[str, tuple[torch.Size, Place]]
    tables: Mapping[str, ops.RowTable] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of main memory."""
        return self.memory.nbytes + sum(table.data.nbytes for table in self.tables.values())


class Parking:
    """Parked weights by a key that says what weights these are, as many as the budget has room for."""

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._parked: OrderedDict[str, ParkedWeights] = OrderedDict()  # the least recently used first

    @property
    def held_bytes(self) -> int:
        """In main memory."""
        with self._lock:
            return sum(parked.nbytes for parked in self._parked.values())

    def find(self, key: str) -> ParkedWeights | None:
        """The weights, which stay parked as long as there is room."""
        with self._lock:
            if key in self._parked:
                self._parked.move_to_end(key)
            return self._parked.get(key)

    def make_room(self, key: str, nbytes: int) -> bool:
        """Whether so many bytes may be parked: not if they are already, or if they are beyond the budget."""
        with self._lock:
            if key in self._parked or nbytes > self.budget_bytes:
                return False
            self._drop(self.budget_bytes - nbytes)
            return True

    def put(self, key: str, parked: ParkedWeights) -> None:
        """Keeps the weights; others that were not used for longer go for them."""
        with self._lock:
            self._parked[key] = parked
            self._drop(self.budget_bytes)
        logger.info("weights_parked", extra=fields(bytes=parked.nbytes, held_bytes=self.held_bytes))

    def _drop(self, most_bytes: int) -> None:
        held = sum(parked.nbytes for parked in self._parked.values())
        while held > most_bytes:
            _, oldest = self._parked.popitem(last=False)
            held -= oldest.nbytes
