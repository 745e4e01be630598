"""A device of plain Python for the scheduler, whose pages remember which token was written where.

With snapshots, it has recurrent states too: each is the history of what went into it.
"""

from dataclasses import dataclass, field

from helexa.engine.pages import PagePool
from helexa.engine.prefix_cache import PrefixCache
from helexa.engine.scheduler import Scheduler
from helexa.engine.sequence import Sequence
from helexa.engine.snapshots import Snapshots
from helexa.engine.state_store import Stored

PAGE = 4
VOCAB = 5


@dataclass
class Device:
    """Runs plans: writes tokens into pages, reads the whole history back and continues it."""

    next_token: object
    num_pages: int
    max_sequences: int = 4
    prefill_chunk: int = 8
    has_prefix_cache: bool = True
    max_context: int = 10**6
    num_snapshots: int | None = None  # None: no recurrent states
    archive: object = None
    plans: list = field(default_factory=list)
    generated: dict = field(default_factory=dict)

    def __post_init__(self):
        self.pool = PagePool(self.num_pages, PAGE)
        slots = range(self.max_sequences + 1, self.max_sequences + 1 + (self.num_snapshots or 0))
        self.snapshots = None if self.num_snapshots is None else Snapshots(slots, self.copy_state)
        self.prefix = PrefixCache(self.pool, self.snapshots) if self.has_prefix_cache else None
        self.scheduler = Scheduler(
            self.pool,
            self.prefix,
            max_context=min(self.max_context, self.num_pages * PAGE),
            max_sequences=self.max_sequences,
            prefill_chunk=self.prefill_chunk,
            snapshot_interval=4 * PAGE,
            snapshot_gap=2,
            archive=self.archive,
        )
        self.states = [None] * (slots.stop + 1)
        self.memory = [[None] * PAGE for _ in range(self.num_pages + 1)]

    def add(self, prompt, num_new=1000, namespace="", priority=0, snapshot_at=None):
        length = min(len(prompt) + num_new, self.scheduler.max_context)
        snapshot_at = (len(prompt) - 1,) if snapshot_at is None else snapshot_at
        sequence = Sequence(
            list(prompt), length, namespace=namespace, priority=priority, snapshot_at=snapshot_at
        )
        self.scheduler.add(sequence)
        self.generated[sequence.number] = []
        return sequence

    def step(self):
        plan = self.scheduler.next()
        if plan is None:
            return None
        self.plans.append((plan.is_prefill, [s.number for s in plan.sequences], plan.num_tokens))
        for copy in plan.copies:
            self.memory[copy.target][: copy.num_tokens] = self.memory[copy.source][: copy.num_tokens]
        self.scheduler.copied(plan)
        if plan.stored is not None:
            self.fetch(plan)
            self.check()
            return plan
        written = set()
        for sequence in plan.sequences:
            for position in range(sequence.num_computed, sequence.num_computed + plan.num_tokens):
                place = sequence.pages[position // PAGE], position % PAGE
                assert place not in written, "two sequences write to one place"
                assert self.pool.holders(place[0]) == 1, "a shared page is written to"
                written.add(place)
                self.memory[place[0]][place[1]] = sequence.token_ids[position]
            self.take_in(sequence, plan.num_tokens)
        self.scheduler.complete(plan)
        for sequence in plan.sequences:
            history = [self.memory[sequence.pages[p // PAGE]][p % PAGE] for p in range(sequence.num_computed)]
            assert history == sequence.token_ids[: sequence.num_computed]
            if sequence.num_pending == 0:
                token = self.next_token(history, VOCAB)
                self.generated[sequence.number].append(token)
                sequence.token_ids.append(token)
                if len(sequence.token_ids) >= sequence.max_length:
                    sequence.finished = True
                    self.scheduler.remove(sequence)
        self.check()
        return plan

    def fetch(self, plan):
        """Brings back what is archived, unless that is lost."""
        (sequence,), stored = plan.sequences, plan.stored
        assert sequence.num_computed == stored.start
        assert sequence.stored[0] is stored
        page = sequence.pages[sequence.depth]
        assert self.pool.holders(page) == 1
        if not self.archive.has(stored):
            self.scheduler.fetch_failed(plan)
            return
        self.memory[page][: plan.num_tokens] = sequence.token_ids[stored.start : stored.end]
        if stored.is_tail:
            self.states[sequence.slot] = sequence.token_ids[: stored.end]
        self.scheduler.complete(plan)

    def copy_state(self, source, target):
        self.states[target] = self.states[source]

    def take_in(self, sequence, num_tokens):
        start = sequence.num_computed
        state = [] if start == 0 else self.states[sequence.slot]
        if self.num_snapshots is not None:
            assert state == sequence.token_ids[:start], "a sequence goes on from another state"
        self.states[sequence.slot] = sequence.token_ids[: start + num_tokens]

    def run(self, limit=100_000):
        for _ in range(limit):
            if self.step() is None:
                return
        raise AssertionError("the scheduler never comes to rest")

    def check(self):
        """Every page is counted exactly, and the tree holds what its nodes say."""
        holders = {}
        for sequence in self.scheduler.running:
            for page in sequence.pages:
                holders[page] = holders.get(page, 0) + 1
        kept = [] if self.prefix is None else [node.page for node in self.prefix.nodes()]
        assert len(kept) == len(set(kept))
        for page in range(1, self.num_pages + 1):
            assert self.pool.holders(page) == holders.get(page, 0)
        assert self.pool.num_used == len(holders)
        assert self.pool.num_cached == len(set(kept) - set(holders))
        assert self.pool.num_free == self.num_pages - len(set(kept) | set(holders))
        for node in () if self.prefix is None else self.prefix.nodes():
            assert tuple(self.memory[node.page][: len(node.token_ids)]) == node.token_ids
            if node.parent is not self.prefix.root:
                assert self.pool.holders(node.parent.page) >= self.pool.holders(node.page)


@dataclass
class Archive:
    """Has a few texts whole, of which some pages and tails are lost without its knowledge."""

    texts: list
    is_hybrid: bool
    lost: set = field(default_factory=set)

    def find(self, token_ids, limit, namespace, known):
        best = []
        for text in self.texts if not namespace else ():
            ends = [*range(PAGE, len(text) + 1, PAGE)]
            entries = [Stored(str(text[:end]), end - PAGE, end, False) for end in ends]
            tails = [
                Stored(f"tail {text[:end]}", (end - 1) // PAGE * PAGE, end, True)
                for end in (*ends, len(text))
            ]
            for tail in tails:
                line = [*(entry for entry in entries if entry.end <= tail.start), tail]
                self.consider(line, token_ids, limit, best)
            if not self.is_hybrid:
                for count in range(1, len(entries) + 1):
                    self.consider(entries[:count], token_ids, limit, best)
        return best if best and best[-1].end > known else []

    def consider(self, line, token_ids, limit, best):
        end = line[-1].end
        is_there = not any(stored.name in self.lost and stored.name in self.tried for stored in line)
        fits = end <= limit and line[-1].name.removeprefix("tail ") == str(token_ids[:end])
        if fits and is_there and end > (best[-1].end if best else 0):
            best[:] = line

    def __post_init__(self):
        self.tried = set()

    def has(self, stored):
        self.tried.add(stored.name)
        return stored.name not in self.lost


def prompt_of(length, start=0):
    return [(start + i * i) % VOCAB for i in range(length)]
