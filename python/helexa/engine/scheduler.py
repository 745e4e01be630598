"""Decides what the device does next: who is admitted, what a step computes, who gives way. No tensors.

The highest priority is admitted first, and within one priority who came first: pages for the whole prompt,
then a seat. A step is either one decode of every sequence that has one pending token, or one chunk of one
prompt; while both wait they alternate, with smaller chunks, so that running streams go on. Several prompts
take turns and pick up the pages that the others have completed in the meantime. When pages run out, unused
cached prefixes go first, then the youngest sequence of the lowest priority returns to the queue and is
recomputed later.

Of models with recurrent layers, the cache holds snapshots of the state too: prompts are cut where one is
taken, and a sequence that leaves has its last one taken.
"""

import time
from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol

from helexa.engine.pages import PagePool
from helexa.engine.prefix_cache import Match, Node, PrefixCache
from helexa.engine.sequence import Sequence
from helexa.engine.snapshots import GAP, INTERVAL, cuts
from helexa.engine.state_store import Stored
from helexa.errors import ContextTooLong


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy the first num_tokens positions of page `source` to page `target` before the step."""

    source: int
    target: int
    num_tokens: int


@dataclass(slots=True)
class Plan:
    """One step: the next `num_tokens` pending tokens of each sequence."""

    sequences: list[Sequence]
    num_tokens: int
    is_prefill: bool
    copies: list[PageCopy] = field(default_factory=list)
    stored: Stored | None = None  # fetch these tokens instead of computing them


class Archive(Protocol):
    """Knows what can be fetched of a prompt that is not cached."""

    def find(self, token_ids: list[int], limit: int, namespace: str, known: int) -> list[Stored]: ...


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
        self.snapshot_interval = snapshot_interval
        self.snapshot_gap = snapshot_gap
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_cached_tokens = 0  # that the prefix cache has spared
        self.num_stored_tokens = 0  # of these, what came from the state store
        self._pool = pool
        self._prefix = prefix
        self._archive = archive
        self._snapshots = None if prefix is None else prefix.snapshots
        self._turn = 0
        self._prefilled_last = False
        self._is_blocked = False  # the head of the queue did not fit, and no page was released since
        self._copies: list[PageCopy] = []
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

    def distrust(self, sequence: Sequence) -> None:
        """Forgets the states from which the sequence could be continued, as what came of them is wrong."""
        sequence.snapshot_position = sequence.num_computed
        while self._snapshots is not None and (snapshot := self._match(sequence).snapshot) is not None:
            self._snapshots.drop(snapshot)

    def adapt(self, tokens_per_s: float) -> None:
        """Chooses the chunks that are computed beside running streams, so that these wait for stall_s."""
        if self.stall_s is not None:
            fitting = int(tokens_per_s * self.stall_s) // CHUNK_STEP * CHUNK_STEP
            self.shared_chunk = max(1, min(max(fitting, CHUNK_STEP), self.prefill_chunk))

    def next(self) -> Plan | None:
        """The next step, or None if there is nothing to do."""
        if self.waiting and not self._is_blocked:
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
        plan.copies, self._copies = self._copies, []
        self._unfinished = plan
        return plan

    def copied(self, plan: Plan) -> None:
        """Notes that the copies of the plan are made: their sources may go."""
        for copy in plan.copies:
            self._pool.release(copy.source)
        plan.copies = []

    def complete(self, plan: Plan) -> None:
        """Notes that the plan has run: its tokens are computed, and full pages become visible to others."""
        page_tokens = self._pool.page_tokens
        self._unfinished = None
        if plan.stored is not None:
            self._complete_fetch(plan.sequences[0])
            return
        for sequence in plan.sequences:
            if sequence.finished:  # what failed before this step failed in it, too
                continue
            # The last token of a prompt that is cached otherwise is computed by a decode step.
            if plan.is_prefill or sequence.num_computed < sequence.num_prompt_tokens:
                sequence.prefilled_tokens += plan.num_tokens
            sequence.num_computed += plan.num_tokens
            if sequence.num_computed >= (sequence.depth + 1) * page_tokens:
                self._publish_pages(sequence)
            if sequence.cuts and sequence.num_computed >= sequence.cuts[-1]:
                self._publish_tail(sequence, with_state=True)
                _drop_cuts(sequence)
            elif plan.is_prefill and sequence.num_pending == 0:
                self._publish_tail(sequence)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            sequence.slot = self._free_slots[-1]
            if not self._take_pages(sequence):
                self._is_blocked = True
                return
            self.waiting.popleft()
            self._free_slots.pop()
            if sequence.admitted_s is None:
                sequence.admitted_s = time.perf_counter()
            self.running.append(sequence)

    def _take_pages(self, sequence: Sequence) -> bool:
        """Gives the sequence pages for all its tokens, shared where possible; False if there are too few."""
        match = self._match(sequence)
        sequence.stored = self._stored(sequence, match.num_tokens)
        if sequence.stored:
            assert self._prefix is not None
            start = sequence.stored[-1].start
            match = Match(self._prefix.match_pages(sequence.token_ids, start, sequence.namespace).nodes)
        if not self._hold(match, sequence):
            # The page to copy takes room beside its copy.
            match = match.without_partial()
            if not self._hold(match, sequence):
                return False
        pool = self._pool
        num_fresh = pool.pages_for(len(sequence.token_ids)) - len(match.nodes)
        self._make_free(num_fresh)
        sequence.pages = [node.page for node in match.nodes] + [pool.allocate() for _ in range(num_fresh)]
        sequence.pages_version += 1
        sequence.depth = len(match.nodes)
        if self._prefix is not None:
            sequence.node = match.nodes[-1] if match.nodes else self._prefix.root
        self._continue(sequence, match)
        sequence.stored = [stored for stored in sequence.stored if stored.end > sequence.num_computed]
        if self._snapshots is not None and sequence.shares_pages:
            sequence.cuts = cuts(
                sequence.snapshot_at,
                sequence.stored[-1].end if sequence.stored else sequence.num_computed,
                len(sequence.token_ids),
                interval=self.snapshot_interval,
                gap=self.snapshot_gap,
            )
        return True

    def _hold(self, match: Match, sequence: Sequence) -> bool:
        """Holds the pages of the match if there is room for the others that the sequence needs."""
        pool = self._pool
        for page in match.pages:
            pool.retain(page)
        # A page per running sequence stays free, or the newcomer would soon be sent away again.
        wanted = pool.pages_for(len(sequence.token_ids)) - len(match.nodes) + len(self.running)
        if wanted <= pool.num_free + pool.num_cached:
            return True
        for page in match.pages:
            pool.release(page)
        return False

    def _continue(self, sequence: Sequence, match: Match) -> None:
        """Notes that the sequence, which has the shared pages of the match, begins after all of it."""
        num_tokens = match.num_tokens
        if match.partial is not None:
            page = sequence.pages[sequence.depth]
            self._copies.append(PageCopy(match.partial.page, page, match.num_partial))
        if self._snapshots is not None and match.snapshot is not None:
            self._snapshots.restore(match.snapshot, sequence.slot)
        self._count_cached(sequence, num_tokens - sequence.num_computed)
        sequence.num_computed = sequence.snapshot_position = num_tokens

    def _match(self, sequence: Sequence) -> Match:
        if self._prefix is None or not sequence.shares_pages:
            return Match([])
        # The last token is always computed: its logits are what the request asks for.
        return self._prefix.match(sequence.token_ids, len(sequence.token_ids) - 1, sequence.namespace)

    def _make_free(self, num_pages: int) -> bool:
        missing = num_pages - self._pool.num_free
        return missing <= 0 or (self._prefix is not None and self._prefix.evict(missing) == missing)

    def _with_room(self, decoding: list[Sequence]) -> list[Sequence]:
        """Those that have a page for their next token; to make room, the last in rank may be sent away."""
        page_tokens = self._pool.page_tokens
        for sequence in decoding:
            if sequence.pages and sequence.num_computed == len(sequence.pages) * page_tokens:
                self._grow(sequence)
        # The first in rank always stays, but that may be one that prefills.
        return [sequence for sequence in decoding if sequence.pages]

    def _grow(self, sequence: Sequence) -> None:
        while not self._make_free(1):
            last = max(self.running, key=_rank)
            self._preempt(last)
            if last is sequence:
                return
        sequence.pages.append(self._pool.allocate())
        sequence.pages_version += 1

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
        if self._snapshots is not None and len(prefilling) > 1:
            prefilling = _without_followers(prefilling)
        sequence = min(prefilling, key=lambda sequence: (sequence.last_turn, *sequence.rank))
        self._turn += 1
        sequence.last_turn = self._turn
        if sequence.stored:
            stored = sequence.stored[0]
            return Plan([sequence], stored.end - stored.start, is_prefill=True, stored=stored)
        if self._snapshots is not None:
            self._skip_to_snapshot(sequence)
        elif sequence.shares_pages and not self._copies:
            self._skip_shared(sequence)
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

    def _complete_fetch(self, sequence: Sequence) -> None:
        stored = sequence.stored.pop(0)
        self._count_cached(sequence, stored.end - sequence.num_computed)
        self.num_stored_tokens += stored.end - sequence.num_computed
        sequence.num_computed = stored.end
        self._publish_pages(sequence)
        node, length = sequence.node, stored.end - stored.start
        if stored.is_tail:
            node = self._publish_tail(sequence, with_state=True)
        assert node is not None
        if stored.is_tail and self._snapshots is not None:
            if (snapshot := node.snapshots.get(length)) is not None:
                snapshot.is_saved = True
        else:
            node.num_saved = max(node.num_saved, length)

    def _stored(self, sequence: Sequence, known: int) -> list[Stored]:
        if self._archive is None or self._prefix is None or not sequence.shares_pages:
            return []
        limit = len(sequence.token_ids) - 1
        return self._archive.find(sequence.token_ids, limit, sequence.namespace, known)

    def _skip_shared(self, sequence: Sequence) -> None:
        """Takes over pages that another sequence has completed since this one was admitted."""
        if self._prefix is None:
            return
        page_tokens = self._pool.page_tokens
        while (end := (sequence.depth + 1) * page_tokens) < len(sequence.token_ids):
            assert sequence.node is not None
            run = tuple(sequence.token_ids[end - page_tokens : end])
            node = self._prefix.find(sequence.node, run, sequence.namespace)
            if node is None:
                return
            self._share(sequence, node)
            self._count_cached(sequence, end - sequence.num_computed)
            sequence.num_computed = end

    def _skip_to_snapshot(self, sequence: Sequence) -> None:
        """Goes on from a snapshot that another sequence has had taken since this one was admitted."""
        match = self._match(sequence)
        start = sequence.num_computed
        if match.num_tokens <= start:
            return
        for node in match.nodes[sequence.depth :]:
            self._share(sequence, node)
        if match.partial is not None:
            self._pool.retain(match.partial.page)
        self._continue(sequence, match)
        _drop_cuts(sequence)

    def _count_cached(self, sequence: Sequence, num_tokens: int) -> None:
        self.num_cached_tokens += num_tokens
        if sequence.num_preemptions == 0:
            sequence.cached_tokens += num_tokens

    def _publish_pages(self, sequence: Sequence) -> None:
        """Puts the full pages that were completed since the last time into the prefix cache."""
        if self._prefix is None or not sequence.shares_pages:
            return
        page_tokens = self._pool.page_tokens
        while (end := (sequence.depth + 1) * page_tokens) <= sequence.num_computed:
            assert sequence.node is not None
            run = tuple(sequence.token_ids[end - page_tokens : end])
            page = sequence.pages[sequence.depth]
            self._share(sequence, self._prefix.insert(sequence.node, run, page, sequence.namespace))

    def _publish_tail(self, sequence: Sequence, *, with_state: bool = False) -> Node | None:
        """Puts the computed part of the last page into the cache; the sequence may append to it still."""
        if self._prefix is None or not sequence.shares_pages:
            return None
        assert sequence.node is not None
        start = sequence.depth * self._pool.page_tokens
        node, offset = sequence.node, self._pool.page_tokens
        if sequence.num_computed > start:
            run = tuple(sequence.token_ids[start : sequence.num_computed])
            node = self._prefix.insert(sequence.node, run, sequence.pages[sequence.depth], sequence.namespace)
            offset = len(run)
        if with_state and self._snapshots is not None and node is not self._prefix.root:
            sequence.snapshot_position = sequence.num_computed
            self._snapshots.take(node, offset, sequence.slot)
        return node

    def _share(self, sequence: Sequence, node: Node) -> None:
        """Steps down to `node`; a page of the same content that the sequence held itself is given back."""
        page = sequence.pages[sequence.depth]
        if page != node.page:
            self._pool.retain(node.page)
            self._pool.release(page)
            sequence.pages[sequence.depth] = node.page
            sequence.pages_version += 1
            self._is_blocked = False
        sequence.node = node
        sequence.depth += 1

    def _release(self, sequence: Sequence) -> None:
        """Frees the pages; what they hold stays in the prefix cache for as long as there is room."""
        # A step that failed has left the state somewhere within it.
        is_whole = self._unfinished is None or sequence not in self._unfinished.sequences
        is_whole = is_whole and not sequence.stored
        is_further = sequence.num_computed > sequence.snapshot_position
        self._publish_tail(sequence, with_state=is_whole and is_further)
        for page in reversed(sequence.pages):
            self._pool.release(page)
        self._free_slots.append(sequence.slot)
        sequence.pages = []
        sequence.pages_version += 1
        sequence.node = None
        sequence.depth = 0
        sequence.num_computed = sequence.snapshot_position = 0
        sequence.cuts, sequence.stored = [], []
        self._is_blocked = False


def _drop_cuts(sequence: Sequence) -> None:
    """Forgets the cuts that the sequence has reached."""
    while sequence.cuts and sequence.cuts[-1] <= sequence.num_computed:
        sequence.cuts.pop()


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
