"""What sequences hold of the KV cache: pages, shared with others where their tokens are the same.

The prefix cache says what is there of a prompt and takes in what is computed. Of models with recurrent layers
it holds snapshots of the state too: prompts are cut where one is taken, and a sequence that leaves has its
last one taken. Decides nothing about who runs, and knows no tensors.
"""

from dataclasses import dataclass
from typing import Protocol

from helexa.engine.pages import PagePool
from helexa.engine.prefix_cache import Match, Node, PrefixCache
from helexa.engine.sequence import Sequence
from helexa.engine.snapshots import GAP, INTERVAL, cuts
from helexa.engine.state_store import Stored


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy the first num_tokens positions of page `source` to page `target` before the step."""

    source: int
    target: int
    num_tokens: int


class Archive(Protocol):
    """Knows what can be fetched of a prompt that is not cached."""

    def find(self, token_ids: list[int], limit: int, namespace: str, known: int) -> list[Stored]: ...


class Holdings:
    """Gives pages to sequences, and takes them back.

    `has_freed` is set when a page is given back by a sequence that goes on.
    """

    def __init__(
        self,
        pool: PagePool,
        prefix: PrefixCache | None,
        *,
        snapshot_interval: int = INTERVAL,
        snapshot_gap: int = GAP,
        archive: Archive | None = None,
    ):
        self.snapshot_interval = snapshot_interval
        self.snapshot_gap = snapshot_gap
        self.num_cached_tokens = 0  # that the prefix cache has spared
        self.num_stored_tokens = 0  # of these, what came from the state store
        self.has_freed = False
        self.snapshots = None if prefix is None else prefix.snapshots
        self._pool = pool
        self._prefix = prefix
        self._archive = archive
        self._copies: list[PageCopy] = []

    def take(self, sequence: Sequence, num_running: int) -> bool:
        """Gives the sequence pages for all its tokens, shared where possible; False if there are too few.

        num_running: the others that run, who may need a page each.
        """
        match = self._match(sequence)
        sequence.stored = self._stored(sequence, match.num_tokens)
        if sequence.stored:
            assert self._prefix is not None
            start = sequence.stored[-1].start
            match = Match(self._prefix.match_pages(sequence.token_ids, start, sequence.namespace).nodes)
        if not self._hold(match, sequence, num_running):
            # The page to copy takes room beside its copy.
            match = match.without_partial()
            if not self._hold(match, sequence, num_running):
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
        if self.snapshots is not None and sequence.shares_pages:
            sequence.cuts = cuts(
                sequence.snapshot_at,
                sequence.stored[-1].end if sequence.stored else sequence.num_computed,
                len(sequence.token_ids),
                interval=self.snapshot_interval,
                gap=self.snapshot_gap,
            )
        return True

    def is_full(self, sequence: Sequence) -> bool:
        """Whether the next token needs one more page."""
        return sequence.num_computed == len(sequence.pages) * self._pool.page_tokens

    def take_page(self, sequence: Sequence) -> bool:
        """Gives the sequence one more page; False if there is none."""
        if not self._make_free(1):
            return False
        sequence.pages.append(self._pool.allocate())
        sequence.pages_version += 1
        return True

    def release(self, sequence: Sequence, *, with_state: bool) -> None:
        """Frees the pages; what they hold stays in the prefix cache for as long as there is room.

        with_state: the state in the sequence's slot is that after all its computed tokens.
        """
        is_further = sequence.num_computed > sequence.snapshot_position
        self._publish_tail(sequence, with_state=with_state and is_further and not sequence.stored)
        for page in reversed(sequence.pages):
            self._pool.release(page)
        sequence.pages = []
        sequence.pages_version += 1
        sequence.node = None
        sequence.depth = 0
        sequence.num_computed = sequence.snapshot_position = 0
        sequence.cuts, sequence.stored = [], []

    def take_copies(self) -> list[PageCopy]:
        """The copies to be made before the next step."""
        copies, self._copies = self._copies, []
        return copies

    def copied(self, copies: list[PageCopy]) -> None:
        """Notes that these are made: their sources may go."""
        for copy in copies:
            self._pool.release(copy.source)

    def catch_up(self, sequence: Sequence) -> None:
        """Takes over what others have computed of the prompt since the sequence was admitted."""
        if self.snapshots is not None:
            self._skip_to_snapshot(sequence)
        elif sequence.shares_pages and not self._copies:
            self._skip_shared(sequence)

    def publish(self, sequence: Sequence, *, is_prefill: bool) -> None:
        """Shows others what was computed: full pages, and the rest of one where a prompt is cut or ends."""
        if sequence.num_computed >= (sequence.depth + 1) * self._pool.page_tokens:
            self._publish_pages(sequence)
        if sequence.cuts and sequence.num_computed >= sequence.cuts[-1]:
            self._publish_tail(sequence, with_state=True)
            _drop_cuts(sequence)
        elif is_prefill and sequence.num_pending == 0:
            self._publish_tail(sequence)

    def fetched(self, sequence: Sequence) -> None:
        """Notes that the first of the sequence's stored tokens are there."""
        stored = sequence.stored.pop(0)
        self._count_cached(sequence, stored.end - sequence.num_computed)
        self.num_stored_tokens += stored.end - sequence.num_computed
        sequence.num_computed = stored.end
        self._publish_pages(sequence)
        node, length = sequence.node, stored.end - stored.start
        if stored.is_tail:
            node = self._publish_tail(sequence, with_state=True)
        assert node is not None
        if stored.is_tail and self.snapshots is not None:
            if (snapshot := node.snapshots.get(length)) is not None:
                snapshot.is_saved = True
        else:
            node.num_saved = max(node.num_saved, length)

    def distrust(self, sequence: Sequence) -> None:
        """Forgets the states from which the sequence could be continued, as what came of them is wrong."""
        sequence.snapshot_position = sequence.num_computed
        while self.snapshots is not None and (snapshot := self._match(sequence).snapshot) is not None:
            self.snapshots.drop(snapshot)

    def _hold(self, match: Match, sequence: Sequence, num_running: int) -> bool:
        """Holds the pages of the match if there is room for the others that the sequence needs."""
        pool = self._pool
        for page in match.pages:
            pool.retain(page)
        # A page per running sequence stays free, or the newcomer would soon be sent away again.
        wanted = pool.pages_for(len(sequence.token_ids)) - len(match.nodes) + num_running
        if wanted <= pool.num_free + pool.num_cached:
            return True
        for page in match.pages:
            pool.release(page)
        return False

    def _make_free(self, num_pages: int) -> bool:
        missing = num_pages - self._pool.num_free
        return missing <= 0 or (self._prefix is not None and self._prefix.evict(missing) == missing)

    def _match(self, sequence: Sequence) -> Match:
        if self._prefix is None or not sequence.shares_pages:
            return Match([])
        # The last token is always computed: its logits are what the request asks for.
        return self._prefix.match(sequence.token_ids, len(sequence.token_ids) - 1, sequence.namespace)

    def _stored(self, sequence: Sequence, known: int) -> list[Stored]:
        if self._archive is None or self._prefix is None or not sequence.shares_pages:
            return []
        limit = len(sequence.token_ids) - 1
        return self._archive.find(sequence.token_ids, limit, sequence.namespace, known)

    def _continue(self, sequence: Sequence, match: Match) -> None:
        """Notes that the sequence, which has the shared pages of the match, begins after all of it."""
        num_tokens = match.num_tokens
        if match.partial is not None:
            page = sequence.pages[sequence.depth]
            self._copies.append(PageCopy(match.partial.page, page, match.num_partial))
        if self.snapshots is not None and match.snapshot is not None:
            self.snapshots.restore(match.snapshot, sequence.slot)
        self._count_cached(sequence, num_tokens - sequence.num_computed)
        sequence.num_computed = sequence.snapshot_position = num_tokens

    def _skip_shared(self, sequence: Sequence) -> None:
        """Takes over full pages."""
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
        """Goes on from a snapshot, if there is one further on."""
        match = self._match(sequence)
        if match.num_tokens <= sequence.num_computed:
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
        if with_state and self.snapshots is not None and node is not self._prefix.root:
            sequence.snapshot_position = sequence.num_computed
            self.snapshots.take(node, offset, sequence.slot)
        return node

    def _share(self, sequence: Sequence, node: Node) -> None:
        """Steps down to `node`; a page of the same content that the sequence held itself is given back."""
        page = sequence.pages[sequence.depth]
        if page != node.page:
            self._pool.retain(node.page)
            self._pool.release(page)
            sequence.pages[sequence.depth] = node.page
            sequence.pages_version += 1
            self.has_freed = True
        sequence.node = node
        sequence.depth += 1


def _drop_cuts(sequence: Sequence) -> None:
    """Forgets the cuts that the sequence has reached."""
    while sequence.cuts and sequence.cuts[-1] <= sequence.num_computed:
        sequence.cuts.pop()
