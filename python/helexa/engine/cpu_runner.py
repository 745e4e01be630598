"""Steps of the model on the CPU: fills the step tensors, runs prefill, replays the captured decode.

A decode step reads tensors that never move, so it is captured once for each batch size; what changes is
written in place. Prefill runs eagerly. Rows that pad a batch to its captured size compute one token in the
scratch page.
"""

import time
from collections.abc import Sequence as ListOf

import numpy as np
import torch
from torch import Tensor

from helexa import ops
from helexa.engine.cache import KVCache, StateCache
from helexa.engine.flight import Flight, Runner, bucket_of
from helexa.engine.pages import SCRATCH_PAGE
from helexa.engine.sampler import Sampled
from helexa.engine.scheduler import Plan
from helexa.engine.sequence import Sequence
from helexa.layers.step import Step
from helexa.models import Model


class CpuFlight(Flight):
    """A step that was done when it had been started."""

    def __init__(self, plan: Plan, logits: ListOf[Tensor] | Tensor):
        super().__init__(plan)
        self._logits = logits

    def sampled(self, index: int) -> Sampled:
        sequence = self.plan.sequences[index]
        assert sequence.sampler is not None
        return sequence.sampler.sample(self._logits[index], len(sequence.token_ids))

    def rows(self) -> Tensor:
        assert isinstance(self._logits, Tensor)
        return self._logits


class CpuRunner(Runner):
    """Computes logits for sequences whose pages the scheduler has assigned; sequences' samplers choose."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        states: StateCache,
        *,
        max_sequences: int,
        max_context: int,
        capture: bool = True,
    ):
        super().__init__(cache, states)
        self._model = model
        self._capture = capture
        max_pages = -(-max_context // cache.page_tokens)
        rows = bucket_of(max_sequences)
        tensors = [torch.zeros(rows, dtype=torch.int32) for _ in range(5)]
        self._token_ids, self._positions, self._slots, self._kv_lengths, self._state_slots = tensors
        self._page_table = torch.full((rows, max_pages), SCRATCH_PAGE, dtype=torch.int32)
        self._query_start = torch.arange(rows + 1, dtype=torch.int32)
        # Views for writing: an assignment to them is several times cheaper than one to a tensor.
        self._write = [tensor.numpy() for tensor in tensors]
        self._write_pages = self._page_table.numpy()
        self._rows: list[tuple[int, int] | None] = [None] * rows  # whose pages each row of the table shows
        self._graphs: dict[int, tuple[ops.CpuGraph, list[Tensor]]] = {}

    def start(self, plan: Plan) -> CpuFlight:
        started_s = time.perf_counter()
        logits: ListOf[Tensor] | Tensor
        if plan.is_prefill:
            (sequence,) = plan.sequences
            wanted = sequence.rows
            logits = self.prefill(
                sequence,
                plan.num_tokens,
                all_rows=wanted is not None and wanted.wants_all,
                hidden=wanted is not None and wanted.wants_hidden,
            )
        else:
            logits = self.decode(plan.sequences)
        flight = CpuFlight(plan, logits)
        flight.started_s = started_s
        return flight

    def decode(self, sequences: ListOf[Sequence]) -> list[Tensor]:
        """One row of logits [V] per sequence, for its one pending token; valid until the next call."""
        rows = bucket_of(len(sequences))
        self._fill(sequences, rows)
        if not self._capture:
            return list(self._model(self._decode_step(rows)))
        if rows not in self._graphs:
            self._graphs[rows] = self._captured(rows)
        graph, logits = self._graphs[rows]
        graph.replay()
        return logits

    def prefill(
        self, sequence: Sequence, num_tokens: int, *, all_rows: bool = False, hidden: bool = False
    ) -> Tensor:
        """Logits [R, V] of the next num_tokens tokens: of all, or of the sequence's last one, or none.

        hidden: the normalised hidden states [R, D] that the logits are made of, instead.
        """
        start, end = sequence.num_computed, sequence.num_computed + num_tokens
        page_tokens = self.cache.page_tokens
        positions = np.arange(start, end, dtype=np.int32)
        pages = np.array(sequence.pages[: -(-end // page_tokens)], dtype=np.int32)
        first = 0 if all_rows else num_tokens - (end == len(sequence.token_ids))
        step = Step(
            token_ids=torch.tensor(sequence.token_ids[start:end], dtype=torch.int32),
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(pages[positions // page_tokens] * page_tokens + positions % page_tokens),
            query_start=torch.tensor([0, num_tokens], dtype=torch.int32),
            kv_lengths=torch.tensor([end], dtype=torch.int32),
            page_table=torch.from_numpy(pages).unsqueeze(0),
            k_cache=self.cache.k,
            v_cache=self.cache.v,
            logits_rows=slice(first, num_tokens),
            state_slots=torch.tensor([sequence.slot], dtype=torch.int32),
            conv_states=self.states.conv,
            states=self.states.recurrent,
        )
        return self._model.hidden(step) if hidden else self._model(step)

    def _fill(self, sequences: ListOf[Sequence], rows: int) -> None:
        token_ids, positions, slots, kv_lengths, state_slots = self._write
        page_tokens = self.cache.page_tokens
        for row, sequence in enumerate(sequences):
            position = sequence.num_computed
            owner = (sequence.number, sequence.pages_version)
            if self._rows[row] != owner:
                self._write_pages[row, : len(sequence.pages)] = sequence.pages
                self._rows[row] = owner
            token_ids[row] = sequence.token_ids[position]
            positions[row] = position
            slots[row] = sequence.pages[position // page_tokens] * page_tokens + position % page_tokens
            kv_lengths[row] = position + 1
            state_slots[row] = sequence.slot
        for row in range(len(sequences), rows):
            if self._rows[row] is not None:
                self._write_pages[row, 0] = SCRATCH_PAGE
                self._rows[row] = None
            token_ids[row] = positions[row] = state_slots[row] = 0
            slots[row] = SCRATCH_PAGE * page_tokens
            kv_lengths[row] = 1

    def _captured(self, rows: int) -> tuple[ops.CpuGraph, list[Tensor]]:
        graph = ops.CpuGraph()
        with graph.capture():
            logits = self._model(self._decode_step(rows))
        return graph, list(logits)

    def _decode_step(self, rows: int) -> Step:
        return Step(
            token_ids=self._token_ids[:rows],
            positions=self._positions[:rows],
            slots=self._slots[:rows],
            query_start=self._query_start[: rows + 1],
            kv_lengths=self._kv_lengths[:rows],
            page_table=self._page_table[:rows],
            k_cache=self.cache.k,
            v_cache=self.cache.v,
            logits_rows=slice(0, rows),
            state_slots=self._state_slots[:rows],
            conv_states=self.states.conv,
            states=self.states.recurrent,
        )
