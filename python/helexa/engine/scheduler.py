"""Decides what the device does next: who is admitted, what a step computes, who gives way. No tensors.

The highest priority is admitted first, and within one priority who came first: pages for the whole prompt,
then a seat. A step is either one decode of every sequence that has one pending token, or one chunk of one
prompt; while both wait they alternate, with smaller chunks, so that running streams go on. Several prompts
take turns and pick up the pages that the others have completed in the meantime. When pages run out, unused
cached prefixes go first, then the youngest sequence of the lowest priority returns to the queue and is
recomputed later. What sequences hold is the business of `holdings`.
"""

import time
from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from operator import attrgetter

from helexa.engine.holdings import Archive, Holdings, PageCopy
from helexa.engine.pages import PagePool
from helexa.engine.prefix_cache import PrefixCache
from helexa.engine.sequence import Sequence
from helexa.engine.snapshots import GAP, INTERVAL
from helexa.engine.state_store import Stored
from helexa.errors import ContextTooLong


@dataclass(slots=True)
class Plan:
    """One step: the next `num_tokens` pending tokens of each sequence."""

    sequences: list[Sequence]
    num_tokens: int
    is_prefill: bool
    copies: list[PageCopy] = field(default_factory=list)
    stored: Stored | None = None  # fetch these tokens instead of computing them


_rank = attrgetter("rank")

CHUNK_STEP = 128  # tokens
ROWS_CHUNK = 512  # tokens, of prompts all of whose logits are wanted: each takes a row over the vocabulary


class Scheduler:
    """Pure decisions over sequences, pages and cached prefixes.

    Call `next`, make the copies and call `copied`, start the plan and call `complete`; whoever cannot
    complete it removes its sequences. A plan is complete once it is certain to run before all later ones and
    the tokens that it computes are known; those that it chooses may be outstanding, Sequence.num_expected.
    """

    def __init__(
        self,
        pool: PagePool,
        prefix: PrefixCache | None,
        *,
        max_context: int,
        max_sequences: int = 4,
        prefill_chunk: int = 512,
        stall_s: float | None = None,
        snapshot_interval: int = INTERVAL,
        snapshot_gap: int = GAP,
        archive: Archive | None = None,
    ):
        assert max_context <= pool.num_pages * pool.page_tokens, "one sequence must always fit"
        self.max_context = max_context
        self.max_sequences = max_sequences
        self.prefill_chunk = prefill_chunk
        self.shared_chunk = max(1, prefill_chunk // 4)
        self.stall_s = stall_s
        self.holdings = Holdings(
            pool, prefix, snapshot_interval=snapshot_interval, snapshot_gap=snapshot_gap, archive=archive
        )
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._turn = 0
        self._prefilled_last = False
        self._is_blocked = False  # the head of the queue did not fit, and no page was released since
        self._unfinished: Plan | None = None  # which is being run
        self._free_slots = list(range(max_sequences, 0, -1))

    def add(self, sequence: Sequence) -> None:
        """Queues the sequence; raises ContextTooLong if it could never run."""
        room = self.max_context - (sequence.rows is None)
        if len(sequence.token_ids) > room:
            raise ContextTooLong(
                f"the prompt has {len(sequence.token_ids)} tokens, but at most {room} fit the context of "
                f"{self.max_context} tokens",
                param="messages",
                max=self.max_context,
                prompt_tokens=len(sequence.token_ids),
            )
        self._enqueue(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Forgets a finished or cancelled sequence and frees its pages; False if it was not here."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
            return True
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            self._is_blocked = False
            return True
        return False

    def adapt(self, tokens_per_s: float) -> None:
        """Chooses the chunks that are computed beside running streams, so that these wait for stall_s."""
        if self.stall_s is not None:
            fitting = int(tokens_per_s * self.stall_s) // CHUNK_STEP * CHUNK_STEP
            self.shared_chunk = max(1, min(max(fitting, CHUNK_STEP), self.prefill_chunk))

    def next(self) -> Plan | None:
        """The next step, or None if there is nothing to do."""
        if self.waiting and (not self._is_blocked or self.holdings.has_freed):
            self._admit()
        decoding = [sequence for sequence in self.running if sequence.is_decoding]
        has_prefill = any(one.is_prefilling for one in self.running)
        if decoding and (self._prefilled_last or not has_prefill):
            decoding = self._with_room(decoding)
            if decoding:
                self._prefilled_last = False
                return self._with_copies(Plan(decoding, 1, is_prefill=False))
        if not has_prefill:
            return None
        self._prefilled_last = True
        return self._with_copies(self._plan_prefill(self.shared_chunk if decoding else self.prefill_chunk))

    def _with_copies(self, plan: Plan) -> Plan:
        plan.copies = self.holdings.take_copies()
        self._unfinished = plan
        return plan

    def copied(self, plan: Plan) -> None:
        """Notes that the copies of the plan are made: their sources may go."""
        self.holdings.copied(plan.copies)
        plan.copies = []

    def complete(self, plan: Plan) -> None:
        """Notes that the plan has run: its tokens are computed, and full pages become visible to others."""
        self._unfinished = None
        if plan.stored is not None:
            self.holdings.fetched(plan.sequences[0])
            return
        for sequence in plan.sequences:
            if sequence.finished:  # what failed before this step failed in it, too
                continue
            # The last token of a prompt that is cached otherwise is computed by a decode step.
            if plan.is_prefill or sequence.num_computed < sequence.num_prompt_tokens:
                sequence.prefilled_tokens += plan.num_tokens
            sequence.num_computed += plan.num_tokens
            self.holdings.publish(sequence, is_prefill=plan.is_prefill)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            sequence.slot = self._free_slots[-1]
            if not self.holdings.take(sequence, len(self.running)):
                self._is_blocked, self.holdings.has_freed = True, False
                return
            self.waiting.popleft()
            self._free_slots.pop()
            if sequence.admitted_s is None:
                sequence.admitted_s = time.perf_counter()
            self.running.append(sequence)

    def _with_room(self, decoding: list[Sequence]) -> list[Sequence]:
        """Those that have a page for their next token; to make room, the last in rank may be sent away."""
        for sequence in decoding:
            if sequence.pages and self.holdings.is_full(sequence):
                self._grow(sequence)
        # The first in rank always stays, but that may be one that prefills.
        return [sequence for sequence in decoding if sequence.pages]

    def _grow(self, sequence: Sequence) -> None:
        while not self.holdings.take_page(sequence):
            last = max(self.running, key=_rank)
            self._preempt(last)
            if last is sequence:
                return

    def _preempt(self, sequence: Sequence) -> None:
        assert len(self.running) > 1, "one sequence alone must always fit"
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_rank)
        if self.waiting[0] is sequence:
            self._is_blocked = False

    def _plan_prefill(self, chunk: int) -> Plan:
        prefilling = [one for one in self.running if one.is_prefilling]
        if self.holdings.snapshots is not None and len(prefilling) > 1:
            prefilling = _without_followers(prefilling)
        sequence = min(prefilling, key=lambda sequence: (sequence.last_turn, *sequence.rank))
        self._turn += 1
        sequence.last_turn = self._turn
        if sequence.stored:
            stored = sequence.stored[0]
            return Plan([sequence], stored.end - stored.start, is_prefill=True, stored=stored)
        self.holdings.catch_up(sequence)
        if sequence.rows is not None and sequence.rows.wants_all:
            chunk = min(chunk, ROWS_CHUNK)
        end = sequence.cuts[-1] if sequence.cuts else len(sequence.token_ids)
        return Plan([sequence], min(chunk, end - sequence.num_computed), is_prefill=True)

    def fetch_failed(self, plan: Plan) -> None:
        """Notes that what the plan was to fetch is lost; the sequence begins again with what is left."""
        (sequence,) = plan.sequences
        self.running.remove(sequence)
        self._release(sequence)
        if sequence.num_preemptions == 0:
            sequence.cached_tokens = 0
        self._enqueue(sequence)

    def _release(self, sequence: Sequence) -> None:
        # A step that failed has left the state somewhere within it.
        is_whole = self._unfinished is None or sequence not in self._unfinished.sequences
        self.holdings.release(sequence, with_state=is_whole)
        self._free_slots.append(sequence.slot)
        self._is_blocked = False


def _without_followers(prefilling: list[Sequence]) -> list[Sequence]:
    """Those that do not have to wait for another one to get to a snapshot that serves both."""
    order = sorted(prefilling, key=lambda sequence: (-sequence.num_computed, *sequence.rank))
    return [
        sequence
        for index, sequence in enumerate(order)
        if not any(_leads(other, sequence) for other in order[:index])
    ]


def _leads(sequence: Sequence, follower: Sequence) -> bool:
    if not sequence.cuts or not follower.shares_pages or sequence.namespace != follower.namespace:
        return False
    end = sequence.cuts[-1]
    is_ahead = follower.num_computed < end < len(follower.token_ids)
    return is_ahead and follower.token_ids[:end] == sequence.token_ids[:end]
