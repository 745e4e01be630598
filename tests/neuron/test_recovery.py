"""What a neuron does by itself after a fault of its device."""

import asyncio

import pytest

from helexa.neuron.recovery import EXIT_DEVICE_LOST, Recovery

BODY = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


@pytest.fixture
def ends() -> list[int]:
    return []


@pytest.fixture
async def watched(client, ends):
    """A recovery over the neuron's models that looks all the time; `lost` says whether the device is."""
    state = {"lost": False}
    recovery = Recovery(
        client.neuron.registry,
        client.neuron.metrics,
        lambda device: state["lost"],
        end=ends.append,
        announce_s=0.05,
        look_s=0.01,
    )
    task = asyncio.create_task(recovery.watch())
    yield state
    task.cancel()


async def until(condition) -> None:
    """Waits for what happens by itself."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_poisoned_model_is_loaded_again_with_what_it_was_loaded_with(client, script, watched, ends):
    first = script.loads[0]
    script.poisoned = "a kernel failed"
    await until(lambda: len(script.loads) == 2)
    script.poisoned = None
    assert script.loads[1] == first
    await until(lambda: script.engines[0].is_closed)
    async with asyncio.timeout(20):
        while (await client.post("/v1/chat/completions", json=BODY)).status_code != 200:
            await asyncio.sleep(0.01)
    assert (await client.get("/health")).json()["status"] == "ok"
    assert ends == []


async def test_a_model_that_is_poisoned_again_and_again_is_left_so(client, script, watched, ends):
    script.poisoned = "a kernel failed"
    await until(lambda: len(script.loads) == 4)
    await asyncio.sleep(0.2)
    assert len(script.loads) == 4
    assert (await client.get("/models")).json()[0]["status"] == "poisoned"
    assert ends == []


async def test_a_lost_device_ends_the_process_after_all_have_been_told(client, script, watched, ends):
    watched["lost"] = True
    script.poisoned = "CUDA error 700"
    await until(lambda: ends)
    assert ends[0] == EXIT_DEVICE_LOST
    health = (await client.get("/health")).json()
    assert health["status"] == "draining"
    assert "lost" in health["reason"]
    answer = await client.post("/v1/chat/completions", json=BODY)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "15"
    assert len(script.loads) == 1
    assert 'helexa_neuron_device_faults_total{device="cpu"}' in (await client.get("/metrics")).text
