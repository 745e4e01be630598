"""Who asks and how urgently, from the headers of a gateway to the queue of the model."""

import asyncio

import pytest

from helexa.errors import ConfigError
from helexa.neuron.caller import caller_of
from helexa.neuron.config import AdmissionSection, StateCacheSection


class Request:
    def __init__(self, **headers):
        self.headers = {f"x-helexa-{name}": value for name, value in headers.items()}


@pytest.mark.parametrize(
    ("priority", "expected"),
    [("5", 5), ("-100", -100), ("", 0), ("high", 0), ("--1", 0), ("1e9", 0), ("٣", 0), ("9" * 5000, 0)],
)
def test_a_priority_is_a_number_or_none(priority, expected):
    assert caller_of(Request(priority=priority, principal="ada")).priority == expected


async def test_the_priority_of_a_key_reaches_the_queue(make_neuron, serve_neuron, script, eventually):
    script.hold = asyncio.Event()
    neuron = make_neuron("m", admission=AdmissionSection(max_in_flight=1))
    async with serve_neuron(neuron) as client:
        await eventually(lambda: neuron.registry.activation().state == "ready")
        (model,) = neuron.registry
        done = []

        async def ask(name, priority):
            headers = {"x-helexa-principal": name, "x-helexa-priority": priority}
            body = {"model": "m", "messages": [{"role": "user", "content": name}]}
            answer = await client.post("/v1/chat/completions", json=body, headers=headers)
            done.append((name, answer.status_code))

        asking = []
        for place, (name, priority) in enumerate((("a", "0"), ("b", "-5"), ("c", "0"), ("d", "9"))):
            asking.append(asyncio.create_task(ask(name, priority)))
            await eventually(
                lambda place=place: model.admission.in_flight + model.admission.queue_depth > place
            )
        script.hold.set()
        await asyncio.gather(*asking)
    assert done == [("a", 200), ("d", 200), ("c", 200), ("b", 200)]


async def test_the_share_of_a_key_is_its_own(make_neuron, serve_neuron, script, eventually):
    script.hold = asyncio.Event()
    neuron = make_neuron("m", admission=AdmissionSection(max_in_flight=1, max_per_principal=1))
    async with serve_neuron(neuron) as client:
        await eventually(lambda: neuron.registry.activation().state == "ready")
        (model,) = neuron.registry
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
        asking = []
        for place, name in enumerate(("ada", "bob")):
            headers = {"x-helexa-principal": name}
            asking.append(
                asyncio.create_task(client.post("/v1/chat/completions", json=body, headers=headers))
            )
            await eventually(
                lambda place=place: model.admission.in_flight + model.admission.queue_depth > place
            )
        refused = await client.post("/v1/chat/completions", json=body, headers={"x-helexa-principal": "ada"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) >= 1
        health = (await client.get("/health")).json()["models"][0]
        assert health["rejected_per_principal"] == 1
        script.hold.set()
        assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200, 200]


@pytest.mark.parametrize(("isolate", "expected"), [(False, ["", ""]), (True, ["ada", "bob"])])
async def test_keys_share_computed_prompts_unless_they_are_isolated(
    make_neuron, serve_neuron, eventually, isolate, expected
):
    neuron = make_neuron("m", state_cache=StateCacheSection(isolate_keys=isolate))
    async with serve_neuron(neuron) as client:
        await eventually(lambda: neuron.registry.activation().state == "ready")
        (model,) = neuron.registry
        for name in ("ada", "bob"):
            body = {"model": "m", "prompt": "hi"}
            headers = {"x-helexa-principal": name}
            assert (await client.post("/v1/completions", json=body, headers=headers)).status_code == 200
        assert model.engine.namespaces == expected


async def test_a_folder_for_states_that_cannot_be_one_ends_the_start(make_neuron, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"state_cache\.path"):
        make_neuron("m", state_cache=StateCacheSection(path=str(tmp_path / "file")))
