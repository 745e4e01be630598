"""When a node that fails its work is left alone, and for how long."""

import asyncio

import pytest

from helexa.gateway import breaker
from helexa.gateway.breaker import Breaker
from helexa.gateway.fleet import Node

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets; what was to happen later happens when it comes to that."""

    class Clock:
        now = 1000.0
        later = ()

        def advance(self, seconds):
            self.now += seconds
            due = [entry for entry in self.later if entry[0] <= self.now]
            self.later = tuple(entry for entry in self.later if entry[0] > self.now)
            for _, action, arguments in due:
                action(*arguments)

        def call_later(self, seconds, action, *arguments):
            self.later += ((self.now + seconds, action, arguments),)

    clock = Clock()
    monkeypatch.setattr(breaker.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(breaker.asyncio, "get_running_loop", lambda: clock)
    return clock


def fail(breaker, node, times=breaker.FAILURES):
    for _ in range(times):
        breaker.failed(node)


def test_three_failures_within_half_a_minute_trip_for_ten_seconds(clock):
    trips, node = Breaker(), Node("n", "http://n")
    fail(trips, node, 2)
    assert not node.tripped
    clock.advance(29)
    fail(trips, node, 1)
    assert node.tripped
    clock.advance(9.9)
    assert node.tripped
    clock.advance(0.2)
    assert not node.tripped


def test_failures_that_are_far_apart_do_not_trip(clock):
    trips, node = Breaker(), Node("n", "http://n")
    for _ in range(20):
        fail(trips, node, 1)
        clock.advance(16)
    assert not node.tripped


def test_nodes_are_counted_apart(clock):
    trips, one, other = Breaker(), Node("a", "http://a"), Node("b", "http://b")
    for _ in range(2):
        fail(trips, one, 1)
        fail(trips, other, 1)
    assert not one.tripped
    assert not other.tripped


def test_each_trip_soon_after_the_last_one_lasts_twice_as_long_up_to_a_limit(clock):
    trips, node = Breaker(), Node("n", "http://n")
    pauses = []
    for _ in range(7):
        fail(trips, node)
        began = clock.now
        while node.tripped:
            clock.advance(5)
        pauses.append(clock.now - began)
    assert pauses == [10, 20, 40, 80, 160, 160, 160]
    clock.advance(31)
    fail(trips, node)
    clock.advance(10)
    assert not node.tripped, "after a quiet time it begins anew"


async def test_requests_stay_away_from_a_node_that_answers_polls_but_not_them(make_site, make_neuron):
    bad = make_neuron("tiny", refusal=(500, {"message": "oops"}, {}))
    good = make_neuron("tiny")
    site = await make_site(bad, good)
    for _ in range(10):
        assert (await site.chat())[0] == 200
    assert (len(bad.requests), len(good.requests)) == (3, 10)
    assert site.gateway.fleet.nodes["n0"].tripped
    assert [node["state"] for node in (await site.get("/fleet"))["nodes"]] == ["tripped", "up"]


async def test_a_node_that_alone_has_the_model_goes_on_being_asked(make_site, make_neuron):
    bad = make_neuron("tiny", refusal=(500, {"message": "oops"}, {}))
    site = await make_site(bad)
    assert [(await site.chat())[0] for _ in range(5)] == [500] * 5
    bad.refusal = None
    assert (await site.chat())[0] == 200


async def test_streams_that_break_off_count(make_site, make_neuron):
    site = await make_site(make_neuron("tiny", half_after=1))
    await asyncio.gather(*(site.stream() for _ in range(3)))
    assert site.gateway.fleet.nodes["n0"].tripped


async def test_a_full_queue_is_no_failure(make_site, make_neuron):
    full = make_neuron("tiny", refusal=(503, {"message": "full", "code": "rate_limit_exceeded"}, {}))
    site = await make_site(full)
    for _ in range(4):
        assert (await site.chat())[0] == 503
    assert not site.gateway.fleet.nodes["n0"].tripped
