import pytest

from helexa.engine.prefix_cache import Node
from helexa.engine.snapshots import Snapshots, borders, cuts

START = 7


@pytest.fixture
def node():
    return Node((1, 2, 3, 4), 1, None, None)


@pytest.fixture
def make():
    """Snapshots over slots that hold what was copied into them."""

    def made(num_slots, states):
        def copy(source, target):
            states[target] = states[source]

        return Snapshots(range(10, 10 + num_slots), copy)

    return made


def test_a_state_comes_back_as_it_was_when_it_was_taken(make, node):
    states = {1: "state"}
    snapshots = make(2, states)
    snapshots.take(node, 2, 1)
    states[1] = "later"
    snapshots.restore(node.snapshots[2], 3)
    assert states[3] == "state"


def test_a_place_is_kept_once(make, node):
    snapshots = make(3, {1: "state", 2: "the same state"})
    for slot in (1, 2):
        snapshots.take(node, 2, slot)
    snapshots.take(node, 3, 1)
    assert sorted(node.snapshots) == [2, 3]
    assert snapshots.num_kept == 2


def test_the_least_recently_used_gives_its_slot_away(make, node):
    snapshots = make(2, {1: "state"})
    evicted = []
    snapshots.on_evict = evicted.append
    snapshots.take(node, 1, 1)
    snapshots.take(node, 2, 1)
    snapshots.touch(node.snapshots[1])
    snapshots.take(node, 3, 1)
    assert [snapshot.offset for snapshot in evicted] == [2]
    assert sorted(node.snapshots) == [1, 3]
    assert snapshots.num_kept == 2


def test_without_slots_nothing_is_kept(make, node):
    make(0, {1: "state"}).take(node, 1, 1)
    assert node.snapshots == {}


def test_the_borders_are_the_end_of_the_system_prompt_and_the_starts_of_the_last_two_messages():
    assert borders([START, 1, 2, START, 3, START, 4, START, 5, START, 6], {START}) == (4, 8, 10)
    assert borders([START, 1, 2, START, 3, START, 4], {START}) == (4, 6)
    assert borders([START, 1, 2], {START}) == (1,)


def test_where_nothing_starts_turns_the_border_is_before_the_last_token():
    assert borders([1, 2, 3], {START}) == (2,)
    assert borders([1, 2, 3], frozenset()) == (2,)


def test_cuts_are_the_borders_and_regular_places_with_some_distance():
    assert cuts([5, 250, 252, 900], 0, 1000, interval=300, gap=10) == [900, 600, 300, 250]
    assert cuts([5, 250, 252, 900], 245, 900, interval=300, gap=10) == [600, 300]
    assert cuts([31, 32, 33], 0, 40) == [32]
