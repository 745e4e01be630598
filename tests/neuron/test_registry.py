"""What draining does to requests that run, wait or arrive."""

import asyncio
import threading
import time

import pytest

from helexa.errors import BadRequest, ShuttingDown, SourceError, Unavailable
from helexa.neuron.config import ModelEntry
from helexa.wire import sse
from helexa.wire.control import LoadOptions, LoadRequest

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


async def test_a_load_that_waits_for_another_one_is_stopped_at_once(make_neuron, script):
    script.load_hold = threading.Event()
    registry = make_neuron().registry
    first, second = (registry.start_load(LoadRequest(model_id=name)) for name in ("a", "b"))
    while not script.loads or second.turn is None:
        await asyncio.sleep(0.005)
    await asyncio.wait_for(registry.unload("b"), 5.0)
    assert isinstance(second.error, Unavailable)
    assert first.status == "loading"
    script.load_hold.set()
    await first.task
    third = await registry.load(LoadRequest(model_id="c"))
    assert third.status == "loaded", "the turn that was not taken was passed on"
    assert len(script.loads) == 2
    await registry.close(0.0)


async def test_failed_loads_of_models_that_are_not_configured_are_forgotten(make_neuron, monkeypatch):
    monkeypatch.setattr("helexa.neuron.registry._MOST_FAILURES", 3)
    registry = make_neuron("configured").registry
    for name in ("configured", *"abcde"):
        with pytest.raises(SourceError):
            await registry.load(LoadRequest(model_id=name, source="nowhere"))
    assert [model.id for model in registry] == ["configured", "c", "d", "e"]
    monkeypatch.setattr("helexa.neuron.registry._FAILURE_S", 0.0)
    with pytest.raises(SourceError):
        await registry.load(LoadRequest(model_id="f", source="nowhere"))
    await asyncio.sleep(0.01)
    assert "f" not in [model.id for model in registry]


async def test_models_that_are_configured_are_listed_when_they_are_not_loaded(make_neuron):
    registry = make_neuron("m").registry
    assert [(info.id, info.status) for info in registry.infos()] == [("m", "unloaded")]
    await registry.load(LoadRequest(model_id="m"))
    assert [(info.id, info.status) for info in registry.infos()] == [("m", "loaded")]
    await registry.unload("m")
    assert [(info.id, info.status) for info in registry.infos()] == [("m", "unloaded")]


async def test_defragmenting_unloads_everything_before_it_loads_anything(make_neuron, serve_neuron, script):
    made = make_neuron()
    for name in ("a", "b"):
        await made.registry.load(LoadRequest(model_id=name, options=LoadOptions(max_context=64)))
    closed_at_load = []
    monitored = made.registry._load

    def load(*arguments, **options):
        closed_at_load.append([engine.is_closed for engine in script.engines[:2]])
        return monitored(*arguments, **options)

    made.registry._load = load
    async with serve_neuron(made) as client:
        response = await client.post("/defrag")
        assert response.status_code == 200
        assert isinstance(response.json()["freed_bytes"], int)
        assert closed_at_load == [[True, True], [True, True]]
        options = {"device": "auto", "max_context": 64}
        assert script.loads[2:] == [("/models/a", options), ("/models/b", options)]
        assert (await client.post("/v1/chat/completions", json=CHAT | {"model": "b"})).status_code == 200


def test_a_recipe_that_is_unknown_is_refused_with_the_configuration():
    assert ModelEntry(id="m", quant="Q4-K-M").options.quant == "Q4-K-M"
    with pytest.raises(ValueError, match="quant is 'q4_m'; did you mean q4_k_m"):
        ModelEntry(id="m", quant="q4_m")


async def test_a_repository_without_the_wanted_file_is_quantized_while_it_loads(
    make_neuron, script, tmp_path
):
    registry = make_neuron().registry
    registry._fetch = lambda source, report: tmp_path
    await registry.load(LoadRequest(model_id="org/repo:Q4_K_M"))
    await registry.load(
        LoadRequest(model_id="b", source="org/repo:Q4_K_M", options=LoadOptions(quant="q8_0"))
    )
    await registry.load(LoadRequest(model_id="c", source="org/repo"))
    registry._fetch = lambda source, report: tmp_path / "repo-Q4_K_M.gguf"
    await registry.load(LoadRequest(model_id="d", source="org/repo:Q4_K_M"))
    assert [options.get("quant") for _, options in script.loads] == ["Q4_K_M", "q8_0", None, None]


async def test_models_at_work_are_not_defragmented(neuron, serve_neuron, script, eventually):
    script.hold = asyncio.Event()
    async with serve_neuron(neuron) as client:
        task = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"stream": False}))
        await eventually(lambda: script.engines[0].running == 1)
        response = await client.post("/defrag")
        assert response.status_code == 503
        assert "'m'" in response.json()["error"]["message"]
        script.hold.set()
        assert (await task).status_code == 200


async def test_memory_that_belongs_to_no_model_is_told(make_neuron, script, monkeypatch):
    resident = 1000
    monkeypatch.setattr("helexa.neuron.registry.memory.resident_bytes", lambda: resident)
    monkeypatch.setattr("helexa.neuron.registry.memory.available_bytes", lambda: 9000)
    registry = make_neuron().registry
    model = await registry.load(LoadRequest(model_id="m"))
    model.claimed_bytes = 500
    assert registry.memory_available_bytes() == 8500, "the model has yet to fill its cache"
    assert registry.unaccounted_bytes() == 0
    await registry.load(LoadRequest(model_id="second"))
    assert script.reserved_bytes == [0, 500], "so the next model does not plan with it"
    resident = 1700
    assert registry.memory_available_bytes() == 9000
    assert registry.unaccounted_bytes() == 200
    model.status = "loading"
    assert registry.unaccounted_bytes() == 0


async def test_what_comes_before_loads_is_waited_for_by_them_and_left_out_after_one(make_neuron, script):
    registry, held = make_neuron().registry, threading.Event()
    before = asyncio.create_task(registry.before_loads(held.wait))
    await asyncio.sleep(0.01)
    model = registry.start_load(LoadRequest(model_id="m"))
    await asyncio.sleep(0.05)
    assert (model.status, script.loads) == ("loading", [])
    held.set()
    await before
    await model.task
    assert model.status == "loaded"
    await registry.before_loads(lambda: pytest.fail("a model is there"))
