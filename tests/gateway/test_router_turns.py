"""Where a request goes while models that share a node take turns."""

import pytest

from helexa.errors import NoPlacement
from helexa.gateway.catalogue import ModelEntry
from helexa.gateway.config import EvictionSection
from helexa.gateway.fleet import Claim
from helexa.gateway.router import Decision, choose
from support.fleets import BIG, catalogue, gpu, make_fleet, make_node

NOW = 1000.0


def taken_node(loaded_ago=None, used_ago=None, load_s=100.0, busy=0, claims=None, **more):
    """Node a, full with `old`, as part of a fleet where `big` would displace it."""
    node = make_node("a", gpu(900, 100), models={"old": ("loaded", 800)})
    if loaded_ago is not None:
        node.loaded_since["old"] = NOW - loaded_ago
    if used_ago is not None:
        node.last_used["old"] = NOW - used_ago
    node.load_seconds["old"] = load_s
    node.active["old"] = busy
    return make_fleet(node, claims=claims or {}, **more)


def waiting(seconds, node="a", displaces=()):
    return Claim(since=NOW - seconds, node=node, displaces=displaces, num_requests=1)


LOAD, WAIT, DUE = (
    Decision("load", "a", "big", ("old",)),
    Decision("wait", "a", "big", ("old",)),
    Decision("wait", "a", "big", ("old",), is_due=True),
)


@pytest.mark.parametrize(
    ("fleet", "expected"),
    [
        pytest.param(taken_node(used_ago=0), LOAD, id="loaded before we came: at its first idle moment"),
        pytest.param(taken_node(loaded_ago=10, used_ago=1), WAIT, id="within its turn"),
        pytest.param(taken_node(loaded_ago=10), WAIT, id="within its turn, not even used yet"),
        pytest.param(taken_node(loaded_ago=31, used_ago=1), LOAD, id="after its turn"),
        pytest.param(
            taken_node(loaded_ago=10, used_ago=4, load_s=3), LOAD, id="idle for the price of a load"
        ),
        pytest.param(taken_node(loaded_ago=10, used_ago=2, load_s=3), WAIT, id="idle for less"),
        pytest.param(taken_node(loaded_ago=31, busy=1), WAIT, id="after its turn, but at work"),
        pytest.param(
            taken_node(loaded_ago=99, busy=1, claims={"big": waiting(29)}),
            WAIT,
            id="waited for not quite a turn",
        ),
        pytest.param(
            taken_node(loaded_ago=99, busy=1, claims={"big": waiting(30)}), DUE, id="waited for a turn"
        ),
        pytest.param(
            taken_node(loaded_ago=10, busy=1, claims={"big": waiting(99)}),
            WAIT,
            id="waited since before that turn",
        ),
        pytest.param(
            taken_node(loaded_ago=99, used_ago=0, claims={"big": waiting(30)}),
            LOAD,
            id="due, and nobody is at work",
        ),
        pytest.param(
            taken_node(loaded_ago=99, claims={"big": waiting(30), "elder": waiting(31)}),
            WAIT,
            id="another has waited longer",
        ),
        pytest.param(
            taken_node(loaded_ago=99, claims={"elder": waiting(1)}),
            WAIT,
            id="another waits, and we have just come",
        ),
        pytest.param(
            taken_node(loaded_ago=99, claims={"big": waiting(30), "younger": waiting(29)}),
            LOAD,
            id="another has waited less",
        ),
        pytest.param(
            taken_node(loaded_ago=99, claims={"big": waiting(30), "elder": waiting(31, "b")}),
            LOAD,
            id="another waits elsewhere",
        ),
        pytest.param(
            taken_node(loaded_ago=99, claims={"big": waiting(30), "humble": waiting(31)}),
            LOAD,
            id="one of a lower class has waited longer",
        ),
    ],
)
def test_turns(fleet, expected):
    listed = catalogue(BIG, ModelEntry("humble", residency_priority=1))
    assert choose(fleet, listed, "big", now=NOW) == expected


def test_a_higher_class_displaces_models_at_work_once_it_has_waited_for_a_turn():
    vip = ModelEntry("big", vram_mb=600, residency_priority=101)
    assert choose(taken_node(busy=1, claims={"big": waiting(29)}), catalogue(vip), "big", now=NOW) == WAIT
    assert choose(taken_node(busy=1, claims={"big": waiting(30)}), catalogue(vip), "big", now=NOW) == LOAD


def test_turns_may_be_switched_off():
    at_once = EvictionSection(turn_s=0)
    fleet = taken_node(loaded_ago=1, used_ago=0)
    assert choose(fleet, catalogue(BIG), "big", now=NOW, eviction=at_once) == LOAD


def test_who_has_had_its_turn_gets_no_new_requests_where_it_must_leave():
    fleet = taken_node(busy=1, claims={"big": waiting(30, displaces=("old",))})
    assert choose(fleet, catalogue(BIG), "old", now=NOW) == Decision("wait", "a", "old")
    fleet.nodes["b"] = make_node("b", models={"old": "loaded"})
    assert choose(fleet, catalogue(BIG), "old", now=NOW) == Decision("serve", "b", "old")


def test_a_model_whose_place_is_being_taken_waits_for_it():
    fleet = make_fleet(make_node("a", gpu(900)), loading={"big": "a"})
    listed = catalogue(BIG, ModelEntry("old", vram_mb=800))
    assert choose(fleet, listed, "old", now=NOW) == Decision("wait", "a", "old", ("big",))
    fleet.claims["old"] = waiting(999)
    assert not choose(fleet, listed, "old", now=NOW).is_due, "a turn that has not begun is not over"


def test_a_place_that_a_higher_class_is_taking_is_no_place():
    fleet = make_fleet(make_node("a", gpu(900)), loading={"vip": "a"})
    listed = catalogue(ModelEntry("vip", vram_mb=600, pinned_on=("a",)), ModelEntry("old", vram_mb=800))
    with pytest.raises(NoPlacement):
        choose(fleet, listed, "old", now=NOW)


def test_room_that_is_free_is_taken_whoever_waits():
    fleet = make_fleet(make_node("a", gpu(900)), claims={"other": waiting(50)})
    assert choose(fleet, catalogue(BIG), "big", now=NOW) == Decision("load", "a", "big")


def test_a_node_where_room_is_free_after_eviction_is_better_than_one_to_wait_for():
    fleet = taken_node(loaded_ago=1)
    fleet.nodes["b"] = make_node("b", gpu(650, 50), models={"idle": ("loaded", 600)})
    assert choose(fleet, catalogue(BIG), "big", now=NOW) == Decision("load", "b", "big", ("idle",))
