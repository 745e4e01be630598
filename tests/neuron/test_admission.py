"""Seats: order, bounds, and nobody's place lost."""

import asyncio
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa.errors import Overloaded, PayloadTooLarge, QuotaExceeded, ShuttingDown
from helexa.neuron.admission import Admission


async def hold(
    admission: Admission, until: asyncio.Event, order: list[int], name: int, seats: int = 1
) -> None:
    async with admission.seat(seats):
        order.append(name)
        await until.wait()


async def test_seats_are_given_in_order_of_arrival():
    admission, order = Admission(2, 8, 5), []
    gates = [asyncio.Event() for _ in range(4)]
    tasks = [asyncio.create_task(hold(admission, gate, order, name)) for name, gate in enumerate(gates)]
    await asyncio.sleep(0.01)
    assert order == [0, 1]
    assert (admission.in_flight, admission.queue_depth) == (2, 2)
    gates[1].set()
    await asyncio.sleep(0.01)
    assert order == [0, 1, 2]
    for gate in gates:
        gate.set()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3]
    assert (admission.in_flight, admission.queue_depth) == (0, 0)


async def test_a_large_request_is_not_starved_by_small_ones():
    admission, order, gate = Admission(2, 8, 5), [], asyncio.Event()
    first = asyncio.create_task(hold(admission, gate, order, 0))
    await asyncio.sleep(0)
    large = asyncio.create_task(hold(admission, gate, order, 1, seats=2))
    await asyncio.sleep(0)
    small = asyncio.create_task(hold(admission, gate, order, 2))
    await asyncio.sleep(0.01)
    assert order == [0]
    gate.set()
    await asyncio.gather(first, large, small)
    assert order == [0, 1, 2]


async def test_a_request_for_more_seats_than_there_are_gets_all_of_them():
    admission = Admission(2, 0, 5)
    async with admission.seat(100):
        assert admission.in_flight == 2


async def test_a_full_queue_refuses_at_once():
    admission, gate = Admission(1, 0, 5), asyncio.Event()
    task = asyncio.create_task(hold(admission, gate, [], 0))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as caught:
        async with admission.seat():
            pass
    assert caught.value.retry_after_s >= 1
    assert admission.rejected_queue_full == 1
    gate.set()
    await task


async def test_a_wait_has_an_end():
    admission, gate = Admission(1, 4, 0.02), asyncio.Event()
    task = asyncio.create_task(hold(admission, gate, [], 0))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match=r"no seat became free within 0\.02 s"):
        async with admission.seat():
            pass
    assert (admission.queue_depth, admission.rejected_timeout) == (0, 1)
    gate.set()
    await task


async def test_closing_refuses_those_who_wait_and_spares_those_who_run():
    admission, gate = Admission(1, 4, 5), asyncio.Event()
    running = asyncio.create_task(hold(admission, gate, [], 0))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(hold(admission, gate, [], 1))
    await asyncio.sleep(0)
    admission.close(ShuttingDown("bye"))
    with pytest.raises(ShuttingDown):
        await waiting
    assert not await admission.wait_idle(0.01)
    gate.set()
    await running
    assert await admission.wait_idle(1)
    with pytest.raises(ShuttingDown):
        async with admission.seat():
            pass


async def test_the_time_to_come_back_follows_how_long_seats_are_held():
    admission = Admission(2, 4, 5)
    assert admission.retry_after_s(0) == 2.5
    admission._mean_hold_s = 40.0
    assert admission.retry_after_s(3) == 80.0
    admission._mean_hold_s = 0.001
    assert admission.retry_after_s(3) == 1.0


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["start", "end", "cancel", "turn"]), st.integers(0, 9)), max_size=60
    ),
    seats=st.integers(1, 3),
)
def test_no_order_of_arrivals_and_departures_loses_a_seat(steps, seats):
    async def play() -> None:
        admission = Admission(seats, 4, 60)
        running: list[tuple[asyncio.Task[None], asyncio.Event]] = []
        for action, number in steps:
            if action == "start":
                gate = asyncio.Event()
                work = hold(admission, gate, [], number, seats=1 + number % 2)
                running.append((asyncio.create_task(work), gate))
            elif action == "turn":
                await asyncio.sleep(0)
            elif running:
                task, gate = running[number % len(running)]
                task.cancel() if action == "cancel" else gate.set()
            assert 0 <= admission.in_flight <= seats
            assert admission.queue_depth <= 4
        for task, gate in running:
            gate.set()
            with suppress(asyncio.CancelledError, Overloaded):
                await task
        assert (admission.in_flight, admission.queue_depth) == (0, 0)

    asyncio.run(play())


class House:
    """An admission and requests in it that a test names; `end` lets one go."""

    def __init__(self, admission: Admission):
        self.admission = admission
        self.order: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str, **claim: Any) -> None:
        self.gates[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._stay(name, claim))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def end(self, name: str) -> None:
        self.gates[name].set()
        await self.tasks[name]
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def end_all(self) -> None:
        for gate in self.gates.values():
            gate.set()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        admission = self.admission
        assert (admission.in_flight, admission.queue_depth, admission.kv_tokens) == (0, 0, 0)
        assert not admission._seats_of
        assert not admission._requests_of

    async def _stay(self, name: str, claim: dict[str, Any]) -> None:
        async with self.admission.seat(**claim):
            self.order.append(name)
            await self.gates[name].wait()


async def test_a_higher_priority_is_seated_before_those_who_came_earlier():
    house = House(Admission(1, 8, 5))
    await house.come("running")
    await house.come("early")
    await house.come("low", priority=-1)
    await house.come("urgent", priority=5)
    for name in ("running", "urgent", "early", "low"):
        await house.end(name)
    assert house.order == ["running", "urgent", "early", "low"]
    await house.end_all()


async def test_a_freed_seat_goes_to_whoever_holds_the_fewest():
    house = House(Admission(2, 8, 5))
    for number in range(4):
        await house.come(f"greedy {number}", principal="greedy")
    await house.come("modest", principal="modest")
    await house.end("greedy 0")
    assert house.order == ["greedy 0", "greedy 1", "modest"]
    await house.end_all()


async def test_one_principal_cannot_have_the_whole_queue():
    house = House(Admission(1, 4, 5))
    for number in range(4):
        await house.come(f"greedy {number}", principal="greedy")
    with pytest.raises(QuotaExceeded, match="4 requests of this key") as caught:
        async with house.admission.seat(principal="greedy"):
            pass
    assert (caught.value.status, caught.value.retry_after_s) == (429, 5.0)
    assert house.admission.rejected_per_principal == 1
    await house.come("modest", principal="modest")
    assert house.admission.queue_depth == 4
    await house.end_all()


async def test_the_share_of_a_principal_can_be_configured_and_the_nameless_have_none():
    house = House(Admission(2, 4, 5, max_per_principal=1))
    await house.come("first", principal="a")
    with pytest.raises(QuotaExceeded):
        async with house.admission.seat(principal="a"):
            pass
    await house.end("first")
    await house.come("again", principal="a")
    for number in range(5):
        await house.come(f"nameless {number}")
    assert house.admission.queue_depth == 4
    await house.end_all()


async def test_a_full_queue_gives_the_place_of_its_last_low_one_to_a_higher_priority():
    house = House(Admission(1, 2, 5))
    for name, priority in (("running", 0), ("low", -1), ("low too", -1), ("urgent", 1)):
        await house.come(name, priority=priority)
    with pytest.raises(Overloaded, match="higher priority"):
        await house.tasks["low too"]
    with pytest.raises(Overloaded, match="which is the limit"):
        async with house.admission.seat(priority=-1):
            pass
    await house.end("running")
    assert house.order == ["running", "urgent"]
    await house.end_all()


async def test_room_in_the_kv_cache_and_a_seat_are_given_together():
    house = House(Admission(4, 8, 5, kv_tokens_total=100))
    await house.come("a", kv_tokens=60)
    await house.come("b", kv_tokens=60)
    await house.come("c", kv_tokens=40)  # fits, but does not overtake
    assert house.order == ["a"]
    assert (house.admission.in_flight, house.admission.kv_tokens) == (1, 60)
    await house.end("a")
    assert house.order == ["a", "b", "c"]
    await house.end_all()


async def test_what_can_never_fit_is_refused_at_once():
    admission = Admission(1, 8, 5, kv_tokens_total=100)
    with pytest.raises(PayloadTooLarge, match="needs room for 101 tokens; the KV cache has 100") as caught:
        async with admission.seat(kv_tokens=101):
            pass
    assert (caught.value.status, caught.value.extra) == (413, {"max": 100})
    async with admission.seat(kv_tokens=100):
        assert admission.kv_tokens == 100


async def test_waiting_for_room_ends_and_says_what_was_missing():
    house = House(Admission(4, 8, 0.02, kv_tokens_total=100))
    await house.come("a", kv_tokens=60)
    with pytest.raises(Overloaded, match="no room in the KV cache became free"):
        async with house.admission.seat(kv_tokens=60):
            pass
    await house.end_all()


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["come", "end", "cancel", "turn"]),
            st.integers(0, 9),
            st.sampled_from(["", "a", "b"]),
            st.integers(-1, 1),
            st.integers(0, 60),
        ),
        max_size=60,
    )
)
def test_whoever_comes_and_goes_nothing_is_lost_and_no_bound_is_broken(steps):
    async def play() -> None:
        house = House(Admission(3, 4, 60, kv_tokens_total=100))
        for step, (action, number, principal, priority, kv_tokens) in enumerate(steps):
            names = list(house.tasks)
            if action == "come":
                claim = {"seats": 1 + number % 2, "principal": principal, "priority": priority}
                await house.come(str(step), kv_tokens=kv_tokens, **claim)
            elif action == "turn":
                await asyncio.sleep(0)
            elif names:
                name = names[number % len(names)]
                house.tasks[name].cancel() if action == "cancel" else house.gates[name].set()
            assert 0 <= house.admission.in_flight <= 3
            assert 0 <= house.admission.kv_tokens <= 100
            assert house.admission.queue_depth <= 4
        await house.end_all()

    asyncio.run(play())


async def test_who_would_be_sent_away_in_any_case_can_be_told_before_asking_for_a_seat():
    admission, order, gate = Admission(1, 1, 5, max_per_principal=1), [], asyncio.Event()
    admission.check()
    tasks = [asyncio.create_task(hold(admission, gate, order, name)) for name in range(2)]
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded, match="which is the limit"):
        admission.check()
    assert admission.rejected_queue_full == 1
    admission.check(priority=1)  # would displace the one that waits
    assert admission.queue_depth == 1
    gate.set()
    await asyncio.gather(*tasks)
    async with admission.seat(principal="anna"):
        with pytest.raises(QuotaExceeded):
            admission.check(principal="anna")
        admission.check(principal="bert")
    admission.close(ShuttingDown("closing"))
    with pytest.raises(ShuttingDown):
        admission.check()
