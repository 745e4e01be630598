"""Where a request goes: tables over hand-made fleets, and properties over random ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.errors import CannotHost, HelexaError, NoPlacement, OutOfMemory, Unavailable, UnknownModel
from helexa.gateway.catalogue import ModelEntry
from helexa.gateway.fleet import Node
from helexa.gateway.router import Decision, choose
from helexa.wire.control import ModelInfo, ModelLoad
from support.fleets import BARE, BIG, catalogue, gpu, make_fleet, make_node


def test_the_least_busy_replica_serves():
    busy = make_node("a", models={"m": "loaded"}, loads=[ModelLoad(id="m", in_flight=1, queue_depth=1)])
    idle = make_node("b", models={"m": "loaded"}, loads=[ModelLoad(id="m", in_flight=1)])
    assert choose(make_fleet(busy, idle), BARE, "m") == Decision("serve", "b", "m")


def test_requests_since_the_last_poll_count_and_are_not_counted_twice():
    a = make_node("a", models={"m": "loaded"}, loads=[ModelLoad(id="m", in_flight=2)])
    b = make_node("b", models={"m": "loaded"}, loads=[ModelLoad(id="m", in_flight=2)])
    a.active["m"], a.active_at_poll["m"] = 2, 2
    b.active["m"], b.active_at_poll["m"] = 1, 0
    assert (a.busy("m"), b.busy("m")) == (2, 3)
    assert choose(make_fleet(a, b), BARE, "m").node == "a"


def test_equally_busy_replicas_are_taken_by_name():
    fleet = make_fleet(make_node("b", models={"m": "loaded"}), make_node("a", models={"m": "loaded"}))
    assert choose(fleet, BARE, "m").node == "a"


@pytest.mark.parametrize(
    "ill",
    [
        {"healthy": False},
        {"suspect": True},
        {"status": "draining"},
        {"models": {"m": "poisoned"}},
        {"loads": [ModelLoad(id="m", poisoned="illegal address")]},
        {"models": {"m": "unloading"}},
        {"models": {"m": "failed"}},
        {"models": {"m": "loading"}},
    ],
    ids=str,
)
def test_a_replica_that_cannot_serve_is_passed_over(ill):
    sick = make_node("a", **{"models": {"m": "loaded"}, **ill})
    well = make_node("b", models={"m": "loaded"}, loads=[ModelLoad(id="m", in_flight=9)])
    assert choose(make_fleet(sick, well), BARE, "m").node == "b"


def test_nodes_that_the_request_has_tried_are_avoided():
    fleet = make_fleet(make_node("a", models={"m": "loaded"}), make_node("b", models={"m": "loaded"}))
    assert choose(fleet, BARE, "m", avoid={"a"}).node == "b"


def test_a_load_of_our_own_is_joined():
    fleet = make_fleet(make_node("a"), make_node("b"), loading={"big": "b"})
    assert choose(fleet, catalogue(BIG), "big") == Decision("join", "b", "big")


def test_a_load_that_somebody_else_began_is_joined():
    fleet = make_fleet(make_node("a"), make_node("b", models={"big": "loading"}))
    assert choose(fleet, catalogue(BIG), "big") == Decision("join", "b", "big")


def test_a_loaded_replica_is_better_than_a_load_under_way():
    fleet = make_fleet(make_node("a", models={"m": "loaded"}), make_node("b", models={"m": "loading"}))
    assert choose(fleet, BARE, "m") == Decision("serve", "a", "m")


@pytest.mark.parametrize("status", ["poisoned", "loaded"])
def test_a_poisoned_model_is_loaded_again_where_it_is_and_nowhere_else(status):
    sick = make_node("a", models={"big": status}, loads=[ModelLoad(id="big", poisoned="illegal address")])
    fleet = make_fleet(sick, make_node("b"))
    assert choose(fleet, catalogue(BIG), "big") == Decision("recover", "a", "big")
    fleet.loading["big"] = "a"
    fleet.recovering.add("big")
    sick.models["big"] = ModelInfo(id="big", status="loading", source="big")
    assert choose(fleet, catalogue(BIG), "big") == Decision("recover", "a", "big")


def test_a_model_that_could_not_be_recovered_is_loaded_elsewhere():
    sick = make_node("a", models={"big": "poisoned"})
    fleet = make_fleet(sick, make_node("b"), failed={("a", "big"): OutOfMemory("no")})
    assert choose(fleet, catalogue(BIG), "big") == Decision("load", "b", "big")


@pytest.mark.parametrize(
    ("nodes", "entry", "node", "evict"),
    [
        pytest.param(
            [make_node("a", gpu(800)), make_node("b", gpu(700))], BIG, "a", (), id="the most free memory"
        ),
        pytest.param(
            [make_node("a", gpu(800, 100)), make_node("b", gpu(700))], BIG, "b", (), id="free now, not in all"
        ),
        pytest.param(
            [make_node("a", gpu(500), gpu(500)), make_node("b", gpu(700))],
            BIG,
            "b",
            (),
            id="one device must hold it",
        ),
        pytest.param(
            [make_node("a", gpu(900)), make_node("b", gpu(400), gpu(400))],
            ModelEntry("big", vram_mb=600, min_devices=2),
            "b",
            (),
            id="as many devices as asked",
        ),
        pytest.param(
            [make_node("a", gpu(900), gpu(200)), make_node("b", gpu(400), gpu(400))],
            ModelEntry("big", vram_mb=600, min_devices=2, min_device_vram_mb=300),
            "b",
            (),
            id="each device large enough",
        ),
        pytest.param(
            [make_node("a", gpu(900)), make_node("b", gpu(700))],
            ModelEntry("big", vram_mb=600, pinned_on=("b",)),
            "b",
            (),
            id="where it is pinned",
        ),
        pytest.param(
            [make_node("a", gpu(900, 100), models={"old": ("loaded", 800)}), make_node("b", gpu(650))],
            BIG,
            "b",
            (),
            id="rather free than after eviction",
        ),
        pytest.param(
            [make_node("a", gpu(900, 100), models={"old": ("loaded", 800)})],
            BIG,
            "a",
            ("old",),
            id="after eviction",
        ),
        pytest.param([make_node("a", ram=700)], BIG, "a", (), id="a node without accelerators by its memory"),
        pytest.param(
            [make_node("b"), make_node("a")], ModelEntry("big"), "a", (), id="unknown need fits anywhere"
        ),
    ],
)
def test_a_cold_model_is_placed(nodes, entry, node, evict):
    assert choose(make_fleet(*nodes), catalogue(entry), "big") == Decision("load", node, "big", evict)


def test_room_promised_to_another_load_is_not_promised_twice():
    fleet = make_fleet(make_node("a", gpu(1000)), make_node("b", gpu(700)), loading={"other": "a"})
    assert choose(fleet, catalogue(BIG, ModelEntry("other", vram_mb=600)), "big").node == "b"


def test_a_higher_class_is_not_displaced_and_the_client_may_try_again():
    fleet = make_fleet(make_node("a", gpu(900, 100), models={"vip": ("loaded", 800)}))
    listed = catalogue(BIG, ModelEntry("vip", vram_mb=800, pinned_on=("a",)))
    with pytest.raises(NoPlacement, match="100 MiB free") as caught:
        choose(fleet, listed, "big")
    assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (
        503,
        "service_unavailable",
        5,
    )


def test_a_model_at_work_is_not_displaced_but_waited_for():
    busy = make_node("a", gpu(900, 100), models={"old": ("loaded", 800)})
    busy.active["old"] = 1
    assert choose(make_fleet(busy), catalogue(BIG), "big") == Decision("wait", "a", "big", ("old",))


def test_the_catalogue_tells_the_size_of_a_resident_that_does_not():
    fleet = make_fleet(make_node("a", gpu(900, 100), models={"old": "loaded"}))
    assert choose(fleet, catalogue(BIG, ModelEntry("old", vram_mb=800)), "big").evict == ("old",)


@pytest.mark.parametrize(
    ("fleet", "listed", "error", "status", "code", "retry"),
    [
        pytest.param(
            make_fleet(make_node("a")), BARE, UnknownModel, 404, "model_not_found", None, id="unknown"
        ),
        pytest.param(
            make_fleet(make_node("a", healthy=False)),
            BARE,
            Unavailable,
            503,
            "service_unavailable",
            5,
            id="none up",
        ),
        pytest.param(make_fleet(), BARE, Unavailable, 503, "service_unavailable", 5, id="no nodes"),
        pytest.param(
            make_fleet(make_node("a", gpu(100)), make_node("b", gpu(900), healthy=False)),
            catalogue(BIG),
            Unavailable,
            503,
            "service_unavailable",
            3,
            id="the one that could is down",
        ),
        pytest.param(
            make_fleet(make_node("a"), make_node("b", models={"big": "loaded"}, healthy=False)),
            BARE,
            Unavailable,
            503,
            "service_unavailable",
            3,
            id="the one that had it is down",
        ),
        pytest.param(
            make_fleet(make_node("a", gpu(100)), Node("b", "http://b")),
            catalogue(BIG),
            Unavailable,
            503,
            "service_unavailable",
            3,
            id="one was never seen",
        ),
        pytest.param(
            make_fleet(make_node("a", gpu(100))),
            catalogue(BIG),
            CannotHost,
            404,
            "service_unavailable",
            None,
            id="never",
        ),
    ],
)
def test_the_refusals(fleet, listed, error, status, code, retry):
    with pytest.raises(error) as caught:
        choose(fleet, listed, "big")
    assert type(caught.value) is error
    assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (status, code, retry)


def test_after_a_failed_load_another_node_is_tried_and_then_the_failure_told():
    failure = OutOfMemory("too small")
    fleet = make_fleet(make_node("a", gpu(900)), make_node("b", gpu(800)), failed={("a", "big"): failure})
    assert choose(fleet, catalogue(BIG), "big").node == "b"
    fleet.failed["b", "big"] = failure
    with pytest.raises(OutOfMemory):
        choose(fleet, catalogue(BIG), "big")


def test_a_load_that_failed_is_not_joined():
    fleet = make_fleet(
        make_node("a", models={"big": "loading"}), make_node("b"), failed={("a", "big"): OutOfMemory("no")}
    )
    assert choose(fleet, catalogue(BIG), "big") == Decision("load", "b", "big")


def test_a_model_that_only_a_neuron_knows_is_loaded_there_again():
    fleet = make_fleet(make_node("a"), make_node("b", models={"own": "failed"}))
    assert choose(fleet, BARE, "own") == Decision("load", "b", "own")


statuses = st.sampled_from(["loading", "loaded", "unloading", "failed", "poisoned"])
nodes = st.builds(
    lambda name, gpus, models, flags, active: _used(make_node(name, *gpus, models=models, **flags), active),
    st.text("abcdef", min_size=1, max_size=2),
    st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), max_size=3),
    st.dictionaries(st.sampled_from("mno"), st.tuples(statuses, st.integers(0, 900))),
    st.fixed_dictionaries({"healthy": st.booleans(), "suspect": st.booleans()}),
    st.dictionaries(st.sampled_from("mno"), st.integers(0, 3)),
)
fleets = st.lists(nodes, max_size=4).map(lambda made: make_fleet(*made))
entries = st.builds(
    ModelEntry,
    id=st.sampled_from("mno"),
    vram_mb=st.integers(0, 1000),
    min_devices=st.integers(1, 2),
    pinned_on=st.lists(st.text("abcdef", min_size=1, max_size=2), max_size=1).map(tuple),
    residency_priority=st.none() | st.integers(0, 3),
)
catalogues = st.lists(entries, max_size=3).map(lambda made: catalogue(*made))


def _used(node, active):
    node.active.update(active)
    return node


@given(fleets, catalogues, st.sampled_from("mnox"))
def test_every_choice_can_be_carried_out(fleet, listed, model):
    try:
        decision = choose(fleet, listed, model)
    except HelexaError as error:
        refused = error.status
    else:
        refused = None
    if refused is not None:
        assert refused in (404, 503)
        assert not any(node.routable and node.is_loaded(model) for node in fleet.nodes.values())
        return
    node = fleet.nodes[decision.node]
    assert node.routable
    if decision.action == "serve":
        assert node.is_loaded(model)
        assert all(
            node.busy(model) <= n.busy(model)
            for n in fleet.nodes.values()
            if n.routable and n.is_loaded(model)
        )
    elif decision.action == "join":
        assert node.models[model].status == "loading"
    elif decision.action == "recover":
        assert node.models[model].status == "poisoned"
    else:
        rank = listed.rank(model)
        assert all(listed.rank(victim) <= rank for victim in decision.evict)
        assert decision.action == "wait" or not any(node.busy(victim) for victim in decision.evict)
        assert model not in decision.evict
        assert model in listed.models or model in node.models


def test_nothing_is_loaded_on_a_server_that_is_no_neuron():
    other = make_node("a", gpu(900), models={"theirs": "loaded", "big": "unloaded"}, kind="openai")
    fleet = make_fleet(other)
    assert choose(fleet, BARE, "theirs") == Decision("serve", "a", "theirs")
    for listed in (catalogue(BIG), BARE):
        with pytest.raises(Unavailable, match="could be served by a"):
            choose(fleet, listed, "big")
    fleet.nodes["b"] = make_node("b", gpu(900))
    assert choose(fleet, catalogue(BIG), "big") == Decision("load", "b", "big")
