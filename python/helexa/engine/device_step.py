"""The tensors of a step on a device, and how they get there: from pinned memory, with one copy for each step.

A copy is done some time after it was asked for, so the host fills another buffer for the next step.
"""

from collections.abc import Sequence as ListOf

import numpy as np
import torch
from torch import Tensor

from helexa.engine.device import Device
from helexa.engine.pages import SCRATCH_PAGE
from helexa.engine.sequence import Sequence

FLIGHTS = 2  # under way at the same time, at most
_ALIGNMENT = 4  # int32 values, so that each tensor starts at a multiple of 16 bytes


class DecodeInputs:
    """What a decode step reads of up to `rows` sequences; rows beyond them compute in the scratch page."""

    def __init__(self, device: Device, *, rows: int, max_pages: int, page_tokens: int):
        self._page_tokens = page_tokens
        self._values = torch.zeros(4, rows, dtype=torch.int32, device=device.tensors)
        self.positions, self.slots, self.kv_lengths, self.state_slots = self._values
        self.query_start = torch.arange(rows + 1, dtype=torch.int32, device=device.tensors)
        self.page_table = torch.full(
            (rows, max_pages), SCRATCH_PAGE, dtype=torch.int32, device=device.tensors
        )
        self._staging = [device.staging(4, rows) for _ in range(FLIGHTS)]
        self._device = device
        self._turn = 0
        self._owners: list[tuple[int, int] | None] = [None] * rows  # whose pages each row of the table shows

    def fill(self, sequences: ListOf[Sequence], rows: int) -> None:
        """Queues the copies for a step of these sequences, padded to so many rows."""
        self._turn = (self._turn + 1) % FLIGHTS
        staging = self._staging[self._turn]
        values = staging.numpy()
        positions, slots, kv_lengths, state_slots = values
        page_tokens = self._page_tokens
        for row, sequence in enumerate(sequences):
            position = sequence.num_computed
            positions[row] = position
            slots[row] = sequence.pages[position // page_tokens] * page_tokens + position % page_tokens
            kv_lengths[row] = position + 1
            state_slots[row] = sequence.slot
            owner = (sequence.number, sequence.pages_version)
            if self._owners[row] != owner:
                self._show(row, sequence.pages, owner)
        padding = slice(len(sequences), rows)
        positions[padding] = state_slots[padding] = 0
        slots[padding] = SCRATCH_PAGE * page_tokens
        kv_lengths[padding] = 1
        for row in range(len(sequences), rows):
            if self._owners[row] is not None:
                self._show(row, [SCRATCH_PAGE], None)
        self._values.copy_(staging, non_blocking=True)

    def _show(self, row: int, pages: list[int], owner: tuple[int, int] | None) -> None:
        staged = self._device.staging(len(pages))  # given back when it is copied
        staged.numpy()[:] = pages
        self.page_table[row, : len(pages)].copy_(staged, non_blocking=True)
        self._owners[row] = owner


class PaddedInputs:
    """What the prefill of a few of one sequence's next tokens reads, in tensors that never move.

    Rows before these are a sequence of its own, at the start of the scratch page.
    """

    def __init__(self, device: Device, *, rows: int, max_pages: int, page_tokens: int):
        self._page_tokens = page_tokens
        self._places, size = _places(rows, rows, rows, 2 * max_pages, 3, 2, 2)
        self._staging = [device.staging(size) for _ in range(FLIGHTS)]
        for staging in self._staging:
            staging[self._places[3]] = SCRATCH_PAGE
        self._turn = 0
        self._values = self._staging[0].to(device.tensors)
        self.token_ids, self.positions, self.slots = (self._values[place] for place in self._places[:3])
        self.page_table = self._values[self._places[3]].view(2, max_pages)
        self.query_start, self.kv_lengths, self.state_slots = (
            self._values[place] for place in self._places[4:]
        )

    def fill(self, sequence: Sequence, num_tokens: int, num_rows: int) -> None:
        """Queues the copy for the first num_rows rows, the last num_tokens of which are the sequence's."""
        self._turn = (self._turn + 1) % FLIGHTS
        staging = self._staging[self._turn]
        values = staging.numpy()
        token_ids, positions, slots, pages, query_start, kv_lengths, state_slots = (
            values[place] for place in self._places
        )
        start, end, first = sequence.num_computed, sequence.num_computed + num_tokens, num_rows - num_tokens
        page_tokens = self._page_tokens
        own_pages = pages[len(pages) // 2 :]
        own_pages[: -(-end // page_tokens)] = sequence.pages[: -(-end // page_tokens)]
        token_ids[:first], token_ids[first:num_rows] = 0, sequence.token_ids[start:end]
        positions[:first], positions[first:num_rows] = np.arange(first), np.arange(start, end)
        slots[:first] = positions[:first] + SCRATCH_PAGE * page_tokens
        there = positions[first:num_rows]
        slots[first:num_rows] = own_pages[there // page_tokens] * page_tokens + there % page_tokens
        query_start[:] = 0, first, num_rows
        kv_lengths[:] = first, end
        state_slots[:] = 0, sequence.slot
        self._values.copy_(staging, non_blocking=True)


class PrefillInputs:
    """What the prefill of one sequence's next tokens reads."""

    def __init__(self, device: Device, sequence: Sequence, num_tokens: int, page_tokens: int):
        start, end = sequence.num_computed, sequence.num_computed + num_tokens
        num_pages = -(-end // page_tokens)
        places, size = _places(num_tokens, num_tokens, num_tokens, num_pages, 2, 1, 1)
        staging = device.staging(size)
        values = staging.numpy()
        token_ids, positions, slots, pages, query_start, kv_lengths, state_slots = (
            values[place] for place in places
        )
        token_ids[:] = sequence.token_ids[start:end]
        positions[:] = np.arange(start, end)
        pages[:] = sequence.pages[:num_pages]
        slots[:] = pages[positions // page_tokens] * page_tokens + positions % page_tokens
        query_start[1], kv_lengths[0], state_slots[0] = num_tokens, end, sequence.slot
        there = staging.to(device.tensors, non_blocking=True)
        self.token_ids, self.positions, self.slots, self.pages = (there[place] for place in places[:4])
        self.query_start, self.kv_lengths, self.state_slots = (there[place] for place in places[4:])


def _places(*lengths: int) -> tuple[list[slice], int]:
    """Where tensors of these lengths lie one after the other, and what they take in all."""
    places, size = [], 0
    for length in lengths:
        places.append(slice(size, size + length))
        size += -(-length // _ALIGNMENT) * _ALIGNMENT
    return places, size


class Landing:
    """Where what one step found arrives in main memory, for the host to read when `wait` has returned."""

    def __init__(self, device: Device, records: Tensor | None):
        self._event = torch.cuda.Event() if device.has_streams else None  # type: ignore[no-untyped-call]
        self._records = None if records is None else device.staging(*records.shape)
        self._device = device
        self._rows: dict[int, Tensor] = {}

    @property
    def records(self) -> "np.ndarray[tuple[int, int], np.dtype[np.int32]]":
        assert self._records is not None
        return self._records.numpy()

    def fetch(self, row: int, logits: Tensor) -> Tensor:
        """Queues a copy of a row of logits; valid until another flight uses this landing."""
        target = self._rows.get(row)
        if target is None:
            target = self._rows[row] = self._device.staging(logits.shape[0], dtype=torch.float32)
        return target.copy_(logits, non_blocking=True)

    def mark(self, records: Tensor | None = None) -> None:
        """Queues a copy of the records; with it and all that was queued before, the step has landed."""
        if records is not None and self._records is not None:
            self._records.copy_(records, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Waits until the step has landed."""
        if self._event is not None:
            self._event.synchronize()
