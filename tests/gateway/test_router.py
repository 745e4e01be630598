"""Where a request goes: tables over hand-made fleets, and properties over random ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.errors import CannotHost, HelexaError, NoPlacement, OutOfMemory, Unavailable, UnknownModel
from helexa.gateway.catalogue import Catalogue, ModelEntry
from helexa.gateway.config import EvictionSection
from helexa.gateway.fleet import Claim, Fleet, Node
from helexa.gateway.router import Decision, choose
from helexa.wire.control import (
    Activation,
    Cpu,
    Device,
    DeviceHealth,
    Discovery,
    Health,
    ModelInfo,
    ModelLoad,
)

MIB = 2**20


def gpu(total, free=None):
    return (total, total if free is None else free)


def make_node(name, *gpus, models=(), loads=(), ram=1000, status="ok", **more):
    """gpus: (total, free) in MiB; models: id → status, or id → (status, MiB)."""
    node = Node(name, f"http://{name}", **{"healthy": True, **more})
    cpu = Cpu(name="CPU", cores=2, threads=2, instruction_sets=[], memory_total_bytes=ram * MIB)
    devices = [
        Device(index=i, name="GPU", memory_total_bytes=total * MIB) for i, (total, _) in enumerate(gpus)
    ]
    node.discovery = Discovery(hostname=name, os="Linux", kernel="6", cpu=cpu, devices=devices)
    readings = [
        DeviceHealth(index=i, memory_used_bytes=0, memory_free_bytes=free * MIB)
        for i, (_, free) in enumerate(gpus)
    ]
    node.health = Health(
        status=status,
        uptime_s=1.0,
        memory_available_bytes=ram * MIB,
        activation=Activation(state="ready"),
        models=[],
        devices=readings,
    )
    for model, told in dict(models).items():
        state, mib = told if isinstance(told, tuple) else (told, 0)
        node.models[model] = ModelInfo(id=model, status=state, source=model, memory_bytes=mib * MIB)
    node.loads = {load.id: load for load in loads}
    return node


def make_fleet(*nodes, **more):
    return Fleet({node.name: node for node in nodes}, **more)


def catalogue(*entries):
    return Catalogue({entry.id: entry for entry in entries})


BIG = ModelEntry("big", vram_mb=600)
BARE = Catalogue()


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


def test_nothing_is_loaded_on_a_server_that_is_no_neuron():
    other = make_node("a", gpu(900), models={"theirs": "loaded", "big": "unloaded"}, kind="openai")
    fleet = make_fleet(other)
    assert choose(fleet, BARE, "theirs") == Decision("serve", "a", "theirs")
    for listed in (catalogue(BIG), BARE):
        with pytest.raises(Unavailable, match="could be served by a"):
            choose(fleet, listed, "big")
    fleet.nodes["b"] = make_node("b", gpu(900))
    assert choose(fleet, catalogue(BIG), "big") == Decision("load", "b", "big")
