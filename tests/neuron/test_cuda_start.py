"""What a neuron says of CUDA devices that it cannot use."""

import httpx
import pytest

from helexa.neuron import handlers
from helexa.wire.control import Cpu, Device, Discovery


@pytest.fixture
def gpu(monkeypatch):
    """A host with a GPU; gpu(problem) says what keeps helexa from using it."""
    cpu = Cpu(name="cpu", cores=1, threads=1, instruction_sets=[], memory_total_bytes=1)
    card = Device(index=0, name="T4", memory_total_bytes=1)
    found = Discovery(hostname="host", os="os", kernel="1", cpu=cpu, devices=[card])
    monkeypatch.setattr(handlers.discovery, "discover", lambda: found)
    return lambda problem: monkeypatch.setattr(handlers, "wake_cuda", lambda: problem)


@pytest.mark.parametrize("problem", [None, "helexa was built without CUDA kernels"])
async def test_why_a_device_cannot_be_used_is_one_sentence(make_neuron, gpu, problem):
    gpu(problem)
    transport = httpx.ASGITransport(make_neuron().app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        answer = (await client.get("/discovery")).json()
    assert [device["name"] for device in answer["devices"]] == ["T4"]
    assert answer.get("cuda_unavailable_reason") == problem
