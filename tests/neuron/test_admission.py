"""Seats: order, bounds, and nobody's place lost."""

import asyncio
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa.errors import Overloaded, ShuttingDown
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
