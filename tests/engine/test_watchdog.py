"""Steps that do not end."""

import asyncio
import threading
import time

import pytest

from helexa.engine.device import Device
from helexa.engine.engine import Engine
from helexa.engine.options import EngineOptions
from helexa.engine.sampling_params import SamplingParams
from helexa.engine.watchdog import Watchdog
from helexa.engine.worker import DeviceWorker
from helexa.errors import DevicePoisoned, InvalidParameter
from support.tiny_config import tiny_config


def test_a_worker_that_hangs_is_given_up_and_what_is_queued_fails():
    faults: list[DevicePoisoned] = []
    worker = DeviceWorker("cpu-0", faults.append)
    end = threading.Event()
    hanging, waiting = worker.call(lambda: end.wait(30)), worker.call(lambda: 1)
    started_s = time.monotonic()
    watchdog = Watchdog(worker, lambda: started_s, 0.1)
    with pytest.raises(DevicePoisoned, match=r"not ended within 0\.1 s"):
        waiting.result(5)
    with pytest.raises(DevicePoisoned):
        worker.call(lambda: 2)
    assert len(faults) == 1
    end.set()
    assert hanging.result(5)
    assert worker.close()
    watchdog.close()


def test_steps_that_end_are_left_alone():
    worker = DeviceWorker("cpu-0")
    watchdog = Watchdog(worker, lambda: time.monotonic() - 0.01, 0.2)
    time.sleep(0.5)
    assert worker.poisoned is None
    assert worker.call(lambda: 1).result(5) == 1
    watchdog.close()
    assert worker.close()


@pytest.fixture
def hung():
    """An engine whose steps last until the event is set, and that event."""
    end = threading.Event()

    def hang(step):
        end.wait(60)
        raise AssertionError("nobody waits for this any more")

    config = tiny_config(32, max_position_embeddings=512)
    options = EngineOptions(capture=False, kv_cache_tokens=512, step_timeout_s=0.3)
    engine = Engine(lambda: hang, config, options, name="hung")
    yield engine, end
    end.set()
    engine.close()


async def test_requests_of_a_hung_step_end_with_an_error_and_closing_does_not_hang(hung):
    engine, _ = hung
    async with asyncio.timeout(20):
        with pytest.raises(DevicePoisoned, match="not ended"):
            async for _ in engine.generate([1, 2, 3], SamplingParams(max_tokens=4)):
                pass
        with pytest.raises(DevicePoisoned):
            async for _ in engine.generate([1], SamplingParams(max_tokens=1)):
                pass
    assert engine.stats().poisoned is not None


async def test_memory_of_a_device_that_hangs_is_not_waited_for(hung, monkeypatch):
    engine, end = hung
    with pytest.raises(DevicePoisoned):
        async for _ in engine.generate([1, 2, 3], SamplingParams(max_tokens=4)):
            pass
    released = []
    monkeypatch.setattr("helexa.engine.host.CLOSE_S", 0.1)
    monkeypatch.setattr("helexa.engine.host.release", lambda: released.append(end.is_set()))
    monkeypatch.setattr(Device, "has_streams", True)
    await asyncio.to_thread(engine.close)
    assert released == []
    end.set()
    monkeypatch.setattr("helexa.engine.host.CLOSE_S", 10.0)
    await asyncio.to_thread(engine.close)
    assert released == [True]


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_a_limit_has_to_be_positive(value):
    with pytest.raises(InvalidParameter, match="step_timeout_s"):
        EngineOptions(step_timeout_s=value)
