"""The scheduler against a device of plain Python: queue, chunks, pages, priorities."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa.errors import ContextTooLong
from support.scheduled_device import PAGE, VOCAB, Archive, Device, prompt_of


@pytest.fixture
def device(history):
    return lambda num_pages=64, **options: Device(history, num_pages, **options)


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
