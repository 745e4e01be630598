import gc
import threading
import weakref

import pytest

from helexa.engine.worker import DeviceWorker
from helexa.errors import BadRequest, DeviceError, DevicePoisoned, ShuttingDown


@pytest.fixture
def worker():
    worker = DeviceWorker("cpu-7")
    yield worker
    assert worker.close()


def test_jobs_run_in_order_on_the_named_thread(worker):
    seen = []
    for i in range(20):
        worker.post(lambda i=i: seen.append((i, threading.current_thread().name)))
    worker.call(lambda: None).result(5)
    assert seen == [(i, "cpu-7") for i in range(20)]


def test_a_call_returns_what_the_job_returns(worker):
    assert worker.call(lambda: 42).result(5) == 42


@pytest.mark.parametrize("error", [BadRequest("no"), DeviceError("not finite")])
def test_a_request_error_fails_only_its_own_job(worker, error):
    def job():
        raise error

    with pytest.raises(type(error)):
        worker.call(job).result(5)
    assert worker.poisoned is None
    assert worker.call(lambda: 1).result(5) == 1


def test_any_other_error_poisons_the_worker_visibly():
    faults = []
    worker = DeviceWorker("cpu-0", faults.append)
    hold = threading.Event()

    def fail():
        hold.wait(5)
        raise RuntimeError("illegal address")

    failing, waiting = worker.call(fail), worker.call(lambda: 1)
    hold.set()
    for future in (failing, waiting):
        with pytest.raises(DevicePoisoned, match=r"cpu-0 failed .*RuntimeError: illegal address"):
            future.result(5)
    assert worker.poisoned == "RuntimeError: illegal address"
    assert [type(fault) for fault in faults] == [DevicePoisoned]
    with pytest.raises(DevicePoisoned):
        worker.call(lambda: 1)
    with pytest.raises(DevicePoisoned):
        worker.post(lambda: 1)
    assert worker.close()


def test_a_fault_in_a_job_that_nobody_waits_for_is_reported_too():
    poisoned = threading.Event()
    worker = DeviceWorker("cpu-0", lambda error: poisoned.set())
    worker.post(lambda: 1 / 0)
    assert poisoned.wait(5)
    assert worker.poisoned == "ZeroDivisionError: division by zero"
    assert worker.close()


def test_closing_drains_what_is_queued_and_refuses_what_is_new():
    worker = DeviceWorker("cpu-0")
    seen = []
    for i in range(5):
        worker.post(lambda i=i: seen.append(i))
    assert worker.close()
    assert seen == [0, 1, 2, 3, 4]
    with pytest.raises(ShuttingDown):
        worker.post(lambda: None)
    assert worker.close()


def test_closing_is_bounded_even_if_a_job_hangs():
    worker = DeviceWorker("cpu-0")
    hold = threading.Event()
    worker.post(lambda: hold.wait(30))
    assert not worker.close(timeout_s=0.05)
    hold.set()
    assert worker.close()


def test_a_cancelled_call_is_skipped(worker):
    hold = threading.Event()
    worker.post(lambda: hold.wait(5))
    future = worker.call(lambda: 1)
    assert future.cancel()
    hold.set()
    assert worker.call(lambda: 2).result(5) == 2


def test_an_error_does_not_carry_the_locals_of_the_device_thread_away(worker):
    class Tensor:
        pass

    alive = []

    def job():
        tensor = Tensor()
        alive.append(weakref.ref(tensor))
        try:
            raise ValueError("inner")
        except ValueError as error:
            raise BadRequest("outer") from error

    future = worker.call(job)
    with pytest.raises(BadRequest) as caught:
        future.result(5)
    gc.collect()
    assert caught.value is not None
    assert alive[0]() is None
