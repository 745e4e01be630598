import pytest

from helexa.engine.prefix_cache import Node
from helexa.engine.snapshots import Snapshots, borders, cuts

START = 7


@pytest.fixture
def node():
    return Node((1, 2, 3, 4), 1, None, None)


def test_a_place_is_kept_once(node):
    snapshots = Snapshots(range(5, 8))
    assert snapshots.add(node, 2).slot == 5
    assert snapshots.add(node, 2) is None
    assert snapshots.add(node, 3).slot == 6
    assert sorted(node.snapshots) == [2, 3]


def test_the_least_recently_used_gives_its_slot_away(node):
    snapshots = Snapshots(range(2))
    first, second = snapshots.add(node, 1), snapshots.add(node, 2)
    snapshots.touch(first)
    assert snapshots.add(node, 3).slot == second.slot
    assert sorted(node.snapshots) == [1, 3]
    assert snapshots.num_kept == 2


def test_without_slots_nothing_is_kept(node):
    assert Snapshots(()).add(node, 1) is None
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
