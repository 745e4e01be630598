"""The scheduler with archives and recurrent states: what is fetched, copied and waited for."""

import pytest

from support.scheduled_device import VOCAB, Archive, Device, prompt_of


@pytest.fixture
def device(history):
    return lambda num_pages=64, **options: Device(history, num_pages, **options)


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
    machine.scheduler.holdings.distrust(first)
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
