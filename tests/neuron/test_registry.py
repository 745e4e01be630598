"""What draining does to requests that run, wait or arrive."""

import asyncio
import threading
import time

import pytest

from helexa.errors import BadRequest, ShuttingDown, SourceError, Unavailable
from helexa.wire import sse
from helexa.wire.control import LoadRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "stream": True}


@pytest.fixture
async def neuron(make_neuron):
    made = make_neuron()
    await made.registry.load(LoadRequest(model_id="m"))
    return made


async def test_a_running_stream_may_finish_within_the_grace(neuron, serve_neuron, script, eventually):
    script.delay_s = 0.01
    async with serve_neuron(neuron) as client:
        task = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        await eventually(lambda: script.engines[0].running == 1)
        closing = asyncio.create_task(neuron.registry.close(5.0))
        await asyncio.sleep(0)
        refused = await client.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert (await client.get("/health")).json()["status"] == "draining"
        assert b'"finish_reason":"stop"' in (await task).content
        await closing
        assert script.engines[0].is_closed


async def test_after_the_grace_a_stream_ends_with_an_error_event(neuron, serve_neuron, script, eventually):
    script.delay_s, script.reply = 0.02, "x" * 1000
    async with serve_neuron(neuron) as client:
        task = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        await eventually(lambda: script.engines[0].running == 1)
        await neuron.registry.close(0.1)
        content = (await task).content
        assert b'"code":"shutting_down"' in content
        assert content.endswith(sse.DONE)
        assert script.engines[0].running == 0


async def test_an_unload_ends_what_runs_with_an_error_after_its_grace(
    neuron, serve_neuron, script, eventually
):
    script.hold = asyncio.Event()
    async with serve_neuron(neuron) as client:
        task = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"stream": False}))
        await eventually(lambda: script.engines[0].running == 1)
        response = await client.post("/models/unload", json={"model_id": "m", "drain_s": 0.05})
        assert response.status_code == 200
        assert (await task).status_code == 503
        assert (await task).json()["error"]["message"] == "model 'm' was unloaded"


async def test_unloading_stops_a_load_under_way(make_neuron, script):
    script.load_hold = threading.Event()
    registry = make_neuron().registry
    model = registry.start_load(LoadRequest(model_id="m"))
    while not script.loads:
        await asyncio.sleep(0.005)
    await registry.unload("m")
    assert list(registry) == []
    assert isinstance(model.error, Unavailable)
    assert not script.engines


async def test_a_loaded_id_cannot_be_loaded_from_elsewhere(neuron):
    with pytest.raises(BadRequest, match="unload it first"):
        neuron.registry.start_load(LoadRequest(model_id="m", source="other"))


async def test_closing_does_not_wait_for_a_load_that_hangs_in_its_progress(make_neuron, script):
    script.load_hold = threading.Event()
    registry = make_neuron().registry
    registry.start_load(LoadRequest(model_id="m"))
    while not script.loads:
        await asyncio.sleep(0.005)
    started = time.monotonic()
    await registry.close(5.0)
    assert time.monotonic() - started < 4
    with pytest.raises(ShuttingDown):
        registry.start_load(LoadRequest(model_id="n"))


async def test_closing_gives_up_on_a_load_that_hangs_without_a_word(make_neuron, monkeypatch):
    monkeypatch.setattr("helexa.neuron.registry._STOP_S", 0.05)
    released, registry = threading.Event(), make_neuron().registry

    def fetch(source, report):
        released.wait()
        raise SourceError("the disk is gone")

    registry._fetch = fetch
    model = registry.start_load(LoadRequest(model_id="m"))
    await asyncio.wait_for(registry.close(0.05), 5.0)
    released.set()
    await model.task
    assert model.status == "failed"


async def test_models_load_one_after_the_other(make_neuron, script):
    script.load_hold = threading.Event()
    registry = make_neuron().registry
    first, second = (registry.start_load(LoadRequest(model_id=name)) for name in ("a", "b"))
    while not script.loads:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.05)
    assert len(script.loads) == 1
    script.load_hold.set()
    await asyncio.gather(first.task, second.task)
    assert [model.status for model in registry] == ["loaded", "loaded"]
    await registry.close(0.0)
