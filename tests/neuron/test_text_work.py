"""Work on texts beside the event loop, with a bound on what waits."""

import asyncio
import threading

import pytest

from helexa.errors import Overloaded
from helexa.neuron.text_work import TextWork


@pytest.fixture
def work():
    made = TextWork(max_pending=3)
    yield made
    made.close()


async def test_the_result_comes_from_another_thread(work):
    assert await work.run(threading.get_ident) != threading.get_ident()
    with pytest.raises(ValueError, match="wrong"):
        await work.run(int, "wrong")


async def test_more_than_may_wait_is_refused_at_once_and_later_work_goes_on(work):
    gate = threading.Event()
    running = [asyncio.create_task(work.run(gate.wait)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="3 requests wait"):
        await work.run(int)
    gate.set()
    assert await asyncio.gather(*running) == [True] * 3
    assert await work.run(int) == 0


async def test_work_whose_client_has_left_is_not_begun(work):
    gate, begun = threading.Event(), []
    running = [asyncio.create_task(work.run(gate.wait)) for _ in range(2)]
    await asyncio.sleep(0)
    left = asyncio.create_task(work.run(begun.append, "it"))
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    gate.set()
    await asyncio.gather(*running)
    await work.run(int)
    assert begun == []
