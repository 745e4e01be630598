"""The scheduler against a device of plain Python, whose pages remember which token was written where.

With snapshots, the device has recurrent states too: each is the history of what went into it.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa.engine.pages import PagePool
from helexa.engine.prefix_cache import PrefixCache
from helexa.engine.scheduler import Scheduler
from helexa.engine.sequence import Sequence
from helexa.engine.snapshots import Snapshots
from helexa.engine.state_store import Stored
from helexa.errors import ContextTooLong

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


@pytest.fixture
def device(history):
    return lambda num_pages=64, **options: Device(history, num_pages, **options)


def prompt_of(length, start=0):
    return [(start + i * i) % VOCAB for i in range(length)]


def test_nothing_to_do_is_no_plan(device):
    assert device().step() is None


def test_a_prompt_is_prefilled_in_chunks_and_then_decoded(device, expected):
    machine = device()
    sequence = machine.add(prompt_of(20), 3)
    machine.run()
    number = sequence.number
    assert machine.plans == [(True, [number], n) for n in (8, 8, 4)] + [(False, [number], 1)] * 2
    assert machine.generated[number] == expected(prompt_of(20), 3, VOCAB)


def test_running_streams_go_on_between_the_smaller_chunks_of_a_long_prompt(device):
    machine = device()
    first = machine.add([1], 40)
    machine.step()
    second = machine.add(prompt_of(20), 1)
    for _ in range(20):
        machine.step()
    kinds = [(is_prefill, numbers) for is_prefill, numbers, _ in machine.plans[1:21]]
    assert kinds == [(True, [second.number]), (False, [first.number])] * 10
    assert {n for is_prefill, _, n in machine.plans[1:] if is_prefill} == {2}


def test_sequences_decode_together_up_to_the_number_of_seats(device, expected):
    machine = device(max_sequences=3)
    prompts = [prompt_of(5, start) for start in range(5)]
    sequences = [machine.add(prompt, 6) for prompt in prompts]
    machine.run()
    assert max(len(numbers) for _, numbers, _ in machine.plans) == 3
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert machine.generated[sequence.number] == expected(prompt, 6, VOCAB)


def test_a_prompt_that_can_never_fit_is_refused_with_both_numbers(device):
    machine = device(num_pages=4)
    with pytest.raises(ContextTooLong, match=r"16 tokens, but at most 15 .* 16 tokens") as caught:
        machine.add(prompt_of(16))
    assert caught.value.extra == {"max": 16, "prompt_tokens": 16}
    machine.add(prompt_of(15))
    machine.run()


def test_a_sequence_may_fill_the_whole_cache(device, expected):
    machine = device(num_pages=4)
    sequence = machine.add([1], 1000)
    machine.run()
    assert machine.generated[sequence.number] == expected([1], 15, VOCAB)


def test_who_came_first_is_admitted_first_even_if_a_later_one_would_fit(device):
    machine = device(num_pages=4)
    running = machine.add(prompt_of(10), 3)
    machine.step()
    large = machine.add(prompt_of(12, 1), 1)
    small = machine.add([1], 1)
    machine.run()
    order = list(dict.fromkeys(numbers[0] for _, numbers, _ in machine.plans))
    assert order == [running.number, large.number, small.number]


def test_the_highest_priority_is_admitted_first_and_within_one_who_came_first(device):
    machine = device(max_sequences=1, has_prefix_cache=False)
    priorities = [0, 0, 2, -1, 2, 0]
    sequences = [machine.add([1, 2, 3], 2, priority=priority) for priority in priorities]
    machine.step()
    machine.run()
    admitted = sorted(sequences, key=lambda sequence: sequence.admitted_s)
    assert [sequences.index(sequence) for sequence in admitted] == [2, 4, 0, 1, 5, 3]


def test_a_higher_priority_is_tried_even_if_the_first_in_the_queue_does_not_fit(device):
    machine = device(num_pages=5, has_prefix_cache=False)
    machine.add(prompt_of(6), 9)
    machine.step()
    large = machine.add(prompt_of(16), 1)
    machine.step()
    urgent = machine.add([1], 1, priority=1)
    machine.step()
    assert urgent.admitted_s is not None
    assert list(machine.scheduler.waiting) == [large]
    machine.run()


def test_when_pages_run_out_the_lowest_priority_gives_way_before_the_youngest(device, expected):
    machine = device(num_pages=6, has_prefix_cache=False)
    prompts = [[1, 2, 3, 4], [2, 3, 4, 0], [3, 4, 0, 1]]
    sequences = [
        machine.add(prompt, 12, priority=priority)
        for prompt, priority in zip(prompts, [0, -1, 0], strict=True)
    ]
    machine.run()
    assert sequences[1].num_preemptions > 0
    assert sequences[0].num_preemptions == 0
    assert sequences[1].num_preemptions >= sequences[2].num_preemptions
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert machine.generated[sequence.number] == expected(prompt, 12, VOCAB)


def test_a_second_turn_prefills_only_what_is_new(device, expected):
    machine = device()
    first = machine.add(prompt_of(9), 4)
    machine.run()
    # The last generated token was never computed: nobody asked for what follows it.
    turn = [*prompt_of(9), *machine.generated[first.number], 3, 3, 3]
    second = machine.add(turn, 2)
    machine.run()
    assert second.cached_tokens == 12
    assert second.prefilled_tokens == len(turn) - 12
    assert machine.generated[second.number] == expected(turn, 2, VOCAB)


def test_the_same_prompt_again_computes_its_last_token_only(device, expected):
    machine = device()
    machine.add(prompt_of(8), 1)
    machine.run()
    again = machine.add(prompt_of(8), 2)
    machine.run()
    assert (again.cached_tokens, again.prefilled_tokens) == (7, 1)
    assert machine.generated[again.number] == expected(prompt_of(8), 2, VOCAB)


def test_a_prompt_that_is_running_serves_the_same_prompt_at_once(device):
    machine = device()
    machine.add(prompt_of(7), 20)
    machine.step()
    second = machine.add(prompt_of(7), 1)
    machine.run()
    assert second.cached_tokens == 6


def test_agents_that_start_together_share_the_work_on_their_common_prompt(device, expected):
    machine = device()
    prompts = [[*prompt_of(64), agent] for agent in range(4)]
    sequences = [machine.add(prompt, 3) for prompt in prompts]
    machine.run()
    computed = sum(sequence.prefilled_tokens for sequence in sequences)
    assert computed <= 64 + 4 * 8
    assert sum(sequence.cached_tokens for sequence in sequences) >= 3 * 64 - 4 * 8
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert machine.generated[sequence.number] == expected(prompt, 3, VOCAB)


def test_agents_that_share_a_prompt_share_its_pages(device):
    machine = device()
    for agent in range(4):
        machine.add([*prompt_of(32), agent], 8)
    while any(sequence.num_pending > 1 for sequence in machine.scheduler.running) or not machine.plans:
        machine.step()
    assert machine.pool.num_used == 8 + 4 * 1


def test_namespaces_are_kept_apart(device):
    machine = device()
    machine.add(prompt_of(20), 1, namespace="a")
    machine.run()
    other = machine.add(prompt_of(20), 1, namespace="b")
    machine.run()
    assert other.cached_tokens == 0


def test_without_a_prefix_cache_nothing_is_kept(device):
    machine = device(has_prefix_cache=False)
    for _ in range(2):
        sequence = machine.add(prompt_of(20), 2)
        machine.run()
        assert sequence.cached_tokens == 0
    assert machine.pool.num_free == machine.num_pages


def test_when_pages_run_out_the_youngest_is_recomputed_later(device, expected):
    machine = device(num_pages=8)
    prompts = [prompt_of(8, start) for start in range(3)]
    sequences = [machine.add(prompt, 20) for prompt in prompts]
    machine.run()
    assert machine.scheduler.num_preemptions > 0
    assert sequences[0].num_preemptions == 0
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert machine.generated[sequence.number] == expected(prompt, 20, VOCAB)


def test_when_all_that_decode_are_sent_away_the_prompt_goes_on(device):
    machine = device(num_pages=5, prefill_chunk=4, has_prefix_cache=False)
    long, short = machine.add([1] * 12, 1), machine.add([2] * 3, 8)
    machine.run()
    assert short.num_preemptions > 0
    assert long.num_preemptions == 0
    assert all(numbers for _, numbers, _ in machine.plans)


def test_cached_prefixes_give_way_before_anyone_is_preempted(device):
    machine = device(num_pages=8)
    machine.add(prompt_of(20), 1)
    machine.run()
    assert machine.pool.num_cached == 5
    machine.add(prompt_of(20, 2), 8)
    machine.run()
    assert machine.scheduler.num_preemptions == 0


def test_cancelling_frees_pages_at_once_and_lets_the_next_one_in(device):
    machine = device(num_pages=4, has_prefix_cache=False)
    first = machine.add(prompt_of(14), 1000)
    machine.step()
    second = machine.add(prompt_of(14), 1)
    machine.step()
    assert list(machine.scheduler.waiting) == [second]
    assert machine.scheduler.remove(first)
    machine.check()
    assert machine.pool.num_used == 0
    machine.step()
    assert machine.scheduler.running == [second]
    assert not machine.scheduler.remove(first)


def test_what_a_cancelled_prompt_has_computed_is_not_lost(device):
    machine = device()
    first = machine.add(prompt_of(30), 1)
    machine.step()
    machine.scheduler.remove(first)
    again = machine.add(prompt_of(30), 1)
    machine.run()
    assert again.cached_tokens == 8


@pytest.mark.parametrize("num_snapshots", [None, 20])
def test_what_is_archived_is_fetched_and_not_computed(device, expected, num_snapshots):
    archive = Archive([prompt_of(30)], num_snapshots is not None)
    machine = device(num_snapshots=num_snapshots, archive=archive)
    sequences = [machine.add([*prompt_of(30), 1, 1], 2) for _ in range(2)]
    machine.run()
    for sequence in sequences:
        assert (sequence.cached_tokens, sequence.prefilled_tokens) in [(30, 2), (31, 1)]
        assert machine.generated[sequence.number] == expected([*prompt_of(30), 1, 1], 2, VOCAB)


@pytest.mark.parametrize("num_snapshots", [None, 20])
def test_what_is_lost_is_computed_after_all(device, expected, num_snapshots):
    archive = Archive([prompt_of(30)], num_snapshots is not None)
    archive.lost = {str(prompt_of(16)), f"tail {prompt_of(16)}"}
    machine = device(num_snapshots=num_snapshots, archive=archive)
    sequence = machine.add([*prompt_of(30), 1, 1], 2)
    machine.run()
    assert (sequence.cached_tokens, sequence.prefilled_tokens) == (12, 20)
    assert machine.generated[sequence.number] == expected([*prompt_of(30), 1, 1], 2, VOCAB)


def test_who_is_cancelled_while_its_past_is_fetched_leaves_no_state(device):
    machine = device(num_snapshots=20, archive=Archive([prompt_of(30)], True))
    sequence = machine.add([*prompt_of(30), 1], 2)
    machine.step()
    machine.scheduler.remove(sequence)
    machine.check()
    assert machine.snapshots.num_kept == 0


def hybrid(device, **options):
    return device(num_snapshots=20, **options)


def test_a_state_is_brought_back_with_its_pages_where_a_sequence_ended(device, expected):
    machine = hybrid(device)
    first = machine.add(prompt_of(9), 4)
    machine.run()
    turn = [*prompt_of(9), *machine.generated[first.number], 3, 3, 3]
    second = machine.add(turn, 2)
    machine.run()
    assert (second.cached_tokens, second.prefilled_tokens) == (12, len(turn) - 12)
    assert machine.generated[second.number] == expected(turn, 2, VOCAB)


def test_a_prompt_is_cut_where_others_may_part_from_it(device, expected):
    machine = hybrid(device)
    machine.add(prompt_of(30), 1, snapshot_at=(11, 27))
    machine.run()
    assert [n for _, _, n in machine.plans] == [8, 3, 5, 8, 3, 3]  # at 16 for the regular distance
    other = machine.add([*prompt_of(13), 4, 4, 4], 2)
    machine.run()
    assert other.cached_tokens == 11
    assert machine.generated[other.number] == expected([*prompt_of(13), 4, 4, 4], 2, VOCAB)


def test_a_few_tokens_are_no_step_of_their_own(device):
    machine = hybrid(device)
    machine.add(prompt_of(10), 1, snapshot_at=(1, 6, 7, 9))
    machine.run()
    assert [n for _, _, n in machine.plans] == [6, 3, 1]


def test_a_snapshot_at_the_end_of_a_page_needs_no_copy(device):
    machine = hybrid(device)
    machine.add(prompt_of(10), 1, snapshot_at=(8,))
    machine.run()
    machine.add([*prompt_of(8), 1, 2, 3], 5)
    plan = machine.scheduler.next()
    assert (plan.copies, plan.sequences[0].num_computed) == ([], 8)


def test_agents_that_start_together_wait_for_the_first_to_reach_a_common_state(device, expected):
    machine = hybrid(device)
    prompts = [[*prompt_of(61), agent, agent, agent] for agent in range(4)]
    sequences = [machine.add(prompt, 3, snapshot_at=(61,)) for prompt in prompts]
    machine.run()
    assert [sequence.prefilled_tokens for sequence in sequences] == [64, 3, 3, 3]
    assert [sequence.cached_tokens for sequence in sequences] == [0, 61, 61, 61]
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert machine.generated[sequence.number] == expected(prompt, 3, VOCAB)


def test_who_waits_for_a_state_finds_it_also_while_another_one_is_admitted(device):
    machine = hybrid(device)
    prompts = [[*prompt_of(29), agent, agent, agent] for agent in range(3)]
    first, second = (machine.add(prompt, 9, snapshot_at=(29,)) for prompt in prompts[:2])
    while first.num_computed < 29:
        machine.step()
    third = machine.add(prompts[2], 9, snapshot_at=(29,))
    machine.run()
    assert [sequence.cached_tokens for sequence in (first, second, third)] == [0, 29, 29]


def test_who_waits_for_a_state_goes_on_when_the_other_is_cancelled(device, expected):
    machine = hybrid(device)
    first, second = (machine.add([*prompt_of(29), agent], 3, snapshot_at=(29,)) for agent in (1, 2))
    machine.step()
    machine.step()
    assert second.num_computed == 0
    machine.scheduler.remove(first)
    machine.run()
    assert second.cached_tokens == 16
    assert machine.generated[second.number] == expected([*prompt_of(29), 2], 3, VOCAB)


def test_others_do_not_wait_for_a_state_that_does_not_serve_them(device):
    machine = hybrid(device)
    machine.add(prompt_of(30), 1)
    other = machine.add(prompt_of(30, 1), 1)
    machine.step()
    machine.step()
    assert other.num_computed > 0


def test_namespaces_do_not_share_states(device):
    machine = hybrid(device)
    sequences = [machine.add(prompt_of(30), 1, namespace=name) for name in "ab"]
    machine.run()
    assert [sequence.cached_tokens for sequence in sequences] == [0, 0]


def test_a_cancelled_prompt_goes_on_from_its_last_chunk(device):
    machine = hybrid(device)
    first = machine.add(prompt_of(30), 1)
    machine.step()
    machine.scheduler.remove(first)
    again = machine.add(prompt_of(30), 1)
    machine.run()
    assert again.cached_tokens == 8


def test_a_step_that_failed_leaves_no_state(device):
    machine = hybrid(device)
    first = machine.add(prompt_of(30), 1)
    machine.step()
    plan = machine.scheduler.next()
    machine.take_in(first, plan.num_tokens)
    machine.scheduler.remove(first)
    again = machine.add(prompt_of(30), 1)
    machine.run()
    assert again.cached_tokens == 0


def test_no_prompt_is_continued_from_a_state_that_made_nonsense(device):
    machine = hybrid(device)
    first = machine.add(prompt_of(30), 5)
    while first.num_pending > 1 or not machine.plans:
        machine.step()
    assert machine.snapshots.num_kept > 0
    machine.scheduler.distrust(first)
    machine.scheduler.remove(first)
    assert machine.snapshots.num_kept == 0
    again = machine.add(prompt_of(30), 5)
    machine.run()
    assert again.cached_tokens == 0


def test_the_snapshot_that_was_not_used_for_longest_gives_way(device):
    machine = device(num_snapshots=4)  # two for each: before the last token of the prompt and at the end
    prompts = [[start, *prompt_of(6)] for start in range(3)]
    for index in (0, 1, 0, 2, 0, 1):
        sequence = machine.add(prompts[index], 1)
        machine.run()
        hits = sequence.cached_tokens
        assert hits == {0: 0, 1: 0, 2: 6, 3: 0, 4: 6, 5: 0}[len(machine.generated) - 1]


requests = st.tuples(
    st.integers(0, 3),  # which of a few common beginnings
    st.integers(0, 24),  # how much of it
    st.lists(st.integers(0, VOCAB - 1), max_size=6),  # what follows
    st.integers(1, 12),  # how many tokens to generate
    st.integers(0, 12),  # steps until the next one arrives
    st.sampled_from([None] * 4 + [0, 1, 5, 9]),  # steps after which it is cancelled
    st.sampled_from(["", "", "other"]),
    st.sampled_from([0, 0, 0, 1, -3]),  # priority
)


@settings(max_examples=150)
@given(
    arrivals=st.lists(requests, min_size=1, max_size=12),
    num_pages=st.integers(9, 24),
    max_sequences=st.integers(1, 5),
    prefill_chunk=st.sampled_from([1, 3, 8, 32]),
    has_prefix_cache=st.sampled_from([True, True, True, False]),
    num_snapshots=st.sampled_from([None, None, 0, 1, 3, 50]),
    archived=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 24)), max_size=3),
    lost=st.sets(st.integers(1, 25), max_size=3),
)
def test_whatever_arrives_every_sequence_gets_its_tokens_and_no_page_is_lost(
    history,
    expected,
    arrivals,
    num_pages,
    max_sequences,
    prefill_chunk,
    has_prefix_cache,
    num_snapshots,
    archived,
    lost,
):
    texts = [[0, *prompt_of(length, start)] for start, length in archived]
    lost = {f"{tail}{text[:end]}" for tail in ("", "tail ") for text in texts for end in lost}
    machine = Device(
        history,
        num_pages,
        max_sequences,
        prefill_chunk,
        has_prefix_cache,
        num_snapshots=num_snapshots,
        archive=Archive(texts, num_snapshots is not None, lost),
    )
    sequences, cancels = [], {}
    steps = 0
    for start, length, tail, num_new, pause, cancel_after, namespace, priority in arrivals:
        prompt = [0, *prompt_of(length, start), *tail][: num_pages * PAGE - 1]
        sequence = machine.add(prompt, num_new, namespace, priority)
        sequences.append((prompt, sequence))
        if cancel_after is not None:
            cancels.setdefault(steps + cancel_after, []).append(sequence)
        for _ in range(pause):
            machine.step()
            steps += 1
            for cancelled in cancels.pop(steps, []):
                cancelled.finished = machine.scheduler.remove(cancelled) or cancelled.finished
                machine.check()
    cancelled = [sequence for group in cancels.values() for sequence in group]
    for sequence in cancelled:
        machine.scheduler.remove(sequence)
    # Bounded: the first in rank gains a page at least with each round of preemptions.
    machine.run(limit=20_000)
    assert not machine.scheduler.running
    assert not machine.scheduler.waiting
    assert machine.pool.num_used == 0
    for prompt, sequence in sequences:
        got = machine.generated[sequence.number]
        assert got == expected(prompt, len(got), VOCAB)
        if len(sequence.token_ids) >= sequence.max_length:
            assert len(got) == sequence.max_length - len(prompt)
        assert sequence.cached_tokens < len(prompt)
    if machine.prefix is not None:
        machine.prefix.evict(num_pages)
    assert machine.pool.num_free == num_pages
    assert machine.snapshots is None or machine.snapshots.num_kept == 0
