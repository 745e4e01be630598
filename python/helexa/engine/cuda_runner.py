"""Steps of the model on a CUDA device: one graph for each batch size of decode, started one step ahead.

Everything that changes from step to step lies in tensors on the device that never move. The tokens that a
step chose stay there for the next one, which is queued before the host has seen them. What the host has to
read is copied back behind each step, and an event tells when it is there.
"""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from helexa import ops
from helexa.engine.cache import KVCache, StateCache
from helexa.engine.device import Device, request_errors
from helexa.engine.device_sampler import is_greedy
from helexa.engine.device_step import FLIGHTS, DecodeInputs, Landing, PrefillInputs
from helexa.engine.flight import Flight, Runner, bucket_of
from helexa.engine.pages import SCRATCH_PAGE
from helexa.engine.phases import Phases
from helexa.engine.prompt_steps import PromptSteps
from helexa.engine.sampler import Sampled, Sampler
from helexa.engine.sampling_params import ResolvedParams
from helexa.engine.scheduler import Plan
from helexa.engine.sequence import Sequence
from helexa.errors import HelexaError
from helexa.layers.step import Step
from helexa.models import Model

_WARM_UP_TOKENS = ops.MAX_MATVEC_ROWS + 1, ops.MAX_MIDDLE_ROWS + 1  # that are computed as longer prompts are


class Chooser(Protocol):
    """Chooses tokens on the device, by what it was told of the sequence in each slot."""

    last_tokens: Tensor  # [num_slots] int32, the token chosen last in each slot
    records: Tensor  # [max_rows, N] int32, what it found in the last launch

    def serves(self, params: ResolvedParams) -> bool: ...

    def bind(self, slot: int, sampler: Sampler, token_ids: list[int], num_prompt_tokens: int) -> None: ...

    def allow(self, slot: int, allowed: npt.NDArray[np.bool_] | int | None) -> None: ...

    def launch(
        self, logits: Tensor, slots: Tensor, positions: Tensor, *, greedy_only: bool = False
    ) -> None: ...

    def read(
        self, records: npt.NDArray[np.int32], row: int, slot: int
    ) -> tuple[int, float | None, list[tuple[int, float]]]: ...


class CudaFlight(Flight):
    """A step that is queued on the device."""

    def __init__(self, runner: "CudaRunner", plan: Plan, logits: Tensor, slots: Tensor, positions: Tensor):
        super().__init__(plan)
        self._runner = runner
        self._logits, self._slots, self._positions = logits, slots, positions
        self._landing = runner.next_landing()
        self._samplers = [one.sampler for one in plan.sequences if one.sampler is not None]
        self._is_chosen = False
        self._errors: dict[int, HelexaError] = {}
        self._host_rows: dict[int, Tensor] = {}  # which the sequences' own samplers choose from
        if not self.chooses or all(sampler.guide is None for sampler in self._samplers):
            self.choose()

    @property
    def may_be_followed(self) -> bool:
        if not self.chooses:
            return True
        for sequence, sampler in zip(self.plan.sequences, self._samplers, strict=True):
            may_replace = sampler.guide is not None and sampler.guide.may_replace
            if not sequence.finished and (may_replace or not self._runner.serves(sampler)):
                return False
        return True

    def choose(self) -> None:
        if self._is_chosen:
            return
        self._is_chosen = True
        if not self.chooses:
            self._landing.mark()
            return
        for row, (sequence, sampler) in enumerate(zip(self.plan.sequences, self._samplers, strict=True)):
            if sequence.finished:
                continue
            if not self._runner.serves(sampler):
                self._host_rows[row] = self._landing.fetch(row, self._logits[row])
            elif sampler.guide is not None:
                try:
                    self._runner.chooser.allow(sequence.slot, sampler.constrain())
                except HelexaError as error:
                    self._errors[row] = error
        greedy_only = all(is_greedy(sampler.params) for sampler in self._samplers)
        self._runner.launch_choice(self._logits, self._slots, self._positions, greedy_only)
        self._landing.mark(self._runner.chooser.records)

    def wait(self) -> None:
        self._landing.wait()

    def sampled(self, index: int) -> Sampled:
        if index in self._errors:
            raise self._errors[index]
        sequence, sampler = self.plan.sequences[index], self._samplers[index]
        if index in self._host_rows:
            sampled = sampler.sample(self._host_rows[index], len(sequence.token_ids))
            self._runner.put_token(sequence.slot, sampled.token_id)
            return sampled
        found = self._runner.chooser.read(self._landing.records, index, sequence.slot)
        sampled = sampler.accept(*found)
        if sampled.token_id != found[0]:
            self._runner.replace_token(sequence, sampled.token_id)
        return sampled

    def rows(self) -> Tensor:
        return self._logits.float().cpu()


class CudaRunner(Runner):
    """Runs steps on one device; on the thread whose current device and stream these are."""

    runs_ahead = True

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        states: StateCache,
        chooser: Chooser,
        device: Device,
        *,
        max_sequences: int,
        max_context: int,
        capture: bool = True,
    ):
        super().__init__(cache, states)
        self.chooser = chooser
        self._model = model
        self._device = device
        self._capture = capture and device.has_streams
        self._max_context = max_context
        self._most_rows = bucket_of(max_sequences)
        self._inputs = DecodeInputs(
            device,
            rows=self._most_rows,
            max_pages=-(-max_context // cache.page_tokens),
            page_tokens=cache.page_tokens,
        )
        self._token_ids = torch.zeros(self._most_rows, dtype=torch.int32, device=device.tensors)
        self._landings = [Landing(device, chooser.records) for _ in range(FLIGHTS)]
        self._turn = 0
        self._prompts = None
        if capture:
            self._prompts = PromptSteps(
                model, cache, states, device, max_context=max_context, capture=self._capture
            )
        self._bound: dict[int, tuple[int, int]] = {}  # by slot: which sequence the chooser knows
        self._logits: dict[int, Tensor] = {}  # of the captured steps, by batch size
        self._bodies: dict[int, torch.cuda.CUDAGraph] = {}
        self._choices: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}  # also by whether all are greedy

    @request_errors()
    def start(self, plan: Plan) -> Flight:
        return self._prefill(plan) if plan.is_prefill else self._decode(plan)

    def prepare(self, phases: Phases) -> None:
        """Runs what will be run, so that all code is loaded, and captures the decode steps."""
        if not self._device.has_streams:
            return
        stream = torch.cuda.current_stream()
        with phases("warm_up"):
            for num_tokens in _WARM_UP_TOKENS:
                self._warm_up(min(num_tokens, self._max_context))
            stream.synchronize()
        if self._capture:
            with phases("capture"):
                pool = torch.cuda.graph_pool_handle()
                rows = self._most_rows
                while rows:
                    self._capture_step(rows, pool)
                    rows //= 2
                stream.synchronize()

    def _warm_up(self, num_tokens: int) -> None:
        sequence = Sequence([0] * num_tokens, num_tokens)
        sequence.pages = [SCRATCH_PAGE] * -(-num_tokens // self.cache.page_tokens)
        self._prefill_logits(sequence, num_tokens)

    def prepare_next(self) -> bool:
        return self._prompts is not None and self._prompts.capture_next()

    def next_landing(self) -> Landing:
        self._turn = (self._turn + 1) % FLIGHTS
        return self._landings[self._turn]

    def serves(self, sampler: Sampler) -> bool:
        """Whether the device chooses a sequence's tokens; if not, its own sampler does."""
        return self.chooser.serves(sampler.params)

    def launch_choice(self, logits: Tensor, slots: Tensor, positions: Tensor, greedy_only: bool) -> None:
        rows = len(logits)
        if logits is self._logits.get(rows):
            self._choices[rows, greedy_only].replay()
        else:
            self.chooser.launch(logits, slots, positions, greedy_only=greedy_only)

    def put_token(self, slot: int, token_id: int) -> None:
        """Has the next step compute this token."""
        self.chooser.last_tokens[slot : slot + 1].fill_(token_id)

    def replace_token(self, sequence: Sequence, token_id: int) -> None:
        """Has the next step compute this token, as if it had been chosen."""
        self._bind(sequence, [*sequence.token_ids, token_id])
        self.put_token(sequence.slot, token_id)

    def _decode(self, plan: Plan) -> Flight:
        rows = bucket_of(len(plan.sequences))
        for sequence in plan.sequences:
            if not self._is_bound(sequence):  # all of its prompt but the last token was cached
                self._bind(sequence, sequence.token_ids)
                self.put_token(sequence.slot, sequence.token_ids[-1])
        self._inputs.fill(plan.sequences, rows)
        if rows in self._bodies:
            self._bodies[rows].replay()
            logits = self._logits[rows]
        else:
            logits = self._decode_logits(rows)
        inputs = self._inputs
        return CudaFlight(self, plan, logits, inputs.state_slots[:rows], inputs.positions[:rows])

    def _prefill(self, plan: Plan) -> Flight:
        (sequence,) = plan.sequences
        is_last = sequence.num_computed + plan.num_tokens == len(sequence.token_ids)
        if is_last and sequence.rows is None:
            self._bind(sequence, sequence.token_ids)
        if self._prompts is not None and self._prompts.serve(sequence, plan.num_tokens):
            logits, slots, positions = self._prompts.logits(sequence, plan.num_tokens)
            return CudaFlight(self, plan, logits if is_last else logits[:0], slots, positions)
        logits, inputs = self._prefill_logits(sequence, plan.num_tokens)
        return CudaFlight(self, plan, logits, inputs.state_slots, inputs.positions[-1:])

    def _is_bound(self, sequence: Sequence) -> bool:
        return self._bound.get(sequence.slot) == (sequence.number, sequence.num_preemptions)

    def _bind(self, sequence: Sequence, token_ids: list[int]) -> None:
        self._bound[sequence.slot] = (sequence.number, sequence.num_preemptions)
        sampler = sequence.sampler
        if sampler is not None and self.serves(sampler):
            self.chooser.bind(sequence.slot, sampler, token_ids, sequence.num_prompt_tokens)

    def _prefill_logits(self, sequence: Sequence, num_tokens: int) -> tuple[Tensor, PrefillInputs]:
        inputs = PrefillInputs(self._device, sequence, num_tokens, self.cache.page_tokens)
        wanted = sequence.rows
        wants_all = wanted is not None and wanted.wants_all
        step = Step(
            token_ids=inputs.token_ids,
            positions=inputs.positions,
            slots=inputs.slots,
            query_start=inputs.query_start,
            kv_lengths=inputs.kv_lengths,
            page_table=inputs.pages.unsqueeze(0),
            k_cache=self.cache.k,
            v_cache=self.cache.v,
            logits_rows=slice(0 if wants_all else num_tokens - 1, num_tokens),
            state_slots=inputs.state_slots,
            conv_states=self.states.conv,
            states=self.states.recurrent,
        )
        hidden = wanted is not None and wanted.wants_hidden
        rows = self._model.hidden(step) if hidden else self._model(step)
        is_last = sequence.num_computed + num_tokens == len(sequence.token_ids)
        return (rows if wants_all or is_last else rows[:0]), inputs

    def _decode_logits(self, rows: int) -> Tensor:
        inputs, token_ids = self._inputs, self._token_ids[:rows]
        state_slots = inputs.state_slots[:rows]
        torch.index_select(self.chooser.last_tokens, 0, state_slots, out=token_ids)
        return self._model(
            Step(
                token_ids=token_ids,
                positions=inputs.positions[:rows],
                slots=inputs.slots[:rows],
                query_start=inputs.query_start[: rows + 1],
                kv_lengths=inputs.kv_lengths[:rows],
                page_table=inputs.page_table[:rows],
                k_cache=self.cache.k,
                v_cache=self.cache.v,
                logits_rows=slice(0, rows),
                state_slots=state_slots,
                conv_states=self.states.conv,
                states=self.states.recurrent,
            )
        )

    def _capture_step(self, rows: int, pool: Any) -> None:
        """The choice has graphs of its own: what a guide allows becomes known while the first one runs."""
        state_slots, positions = self._inputs.state_slots[:rows], self._inputs.positions[:rows]
        self._inputs.fill([], rows)
        logits = self._decode_logits(rows)  # so that all is loaded
        self._bodies[rows] = torch.cuda.CUDAGraph()
        with ops.captured(self._bodies[rows], pool):
            self._logits[rows] = self._decode_logits(rows)
        for greedy_only in (True, False):
            self.chooser.launch(logits, state_slots, positions, greedy_only=greedy_only)
            self._choices[rows, greedy_only] = torch.cuda.CUDAGraph()
            with ops.captured(self._choices[rows, greedy_only], pool):
                self.chooser.launch(self._logits[rows], state_slots, positions, greedy_only=greedy_only)
