"""Where models may go."""

import dataclasses
import queue
import threading

import pytest
import torch

from helexa import ops
from helexa.engine import device as module
from helexa.engine import preflight
from helexa.engine.cache import KVCache
from helexa.engine.device import Device, HostCopy, cuda_problem, find_devices, request_errors
from helexa.engine.options import EngineOptions
from helexa.engine.workspace import workspace_nbytes
from helexa.errors import InvalidParameter, OutOfMemory, UnsupportedModel
from helexa.models import config_from_gguf
from helexa.weights.model_file import open_model
from support.hf_checkpoint import GOLDEN


@pytest.fixture
def two_gpus(monkeypatch):
    """As if there were two CUDA devices; two_gpus[index] is what is free on each."""
    free = {"cuda:0": 10 << 30, "cuda:1": 20 << 30, "cpu": 5 << 30}
    problems = dict.fromkeys(range(2))
    none = "there are 2 CUDA devices, numbered from 0"
    monkeypatch.setattr(module, "EMULATED", False)
    monkeypatch.setattr(module, "cuda_problem", lambda index=0: problems.get(index, none))
    monkeypatch.setattr(Device, "free_bytes", lambda self: free[self.name])
    monkeypatch.setattr(preflight, "weight_nbytes", lambda *_: 1 << 20)
    return free


@pytest.fixture
def model():
    with open_model(GOLDEN / "qwen3.gguf") as file:
        yield file.tensors, config_from_gguf(file.metadata, file.tensors)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", "", "cuda:0 "])
def test_a_device_of_another_name_is_refused(name):
    with pytest.raises(InvalidParameter, match="expected cpu, cuda:0"):
        EngineOptions(device=name)


@pytest.mark.parametrize("name", ["cpu", "auto", "cuda", "cuda:0", "cuda:12"])
def test_devices_have_names(name):
    assert EngineOptions(device=name).device == name


@pytest.mark.skipif(torch.cuda.is_available() or module.EMULATED, reason="there is a CUDA device")
def test_without_a_cuda_device_the_reason_is_one_sentence_and_the_cpu_serves():
    assert "\n" not in cuda_problem()
    with pytest.raises(InvalidParameter, match=r"device is 'cuda:1', but \w+"):
        find_devices("cuda:1")
    assert find_devices("auto") == find_devices("cpu") == [Device("cpu")]


def test_a_build_without_kernels_says_so(monkeypatch):
    monkeypatch.setattr(module, "EMULATED", False)
    monkeypatch.setattr(ops, "has_cuda", False)
    assert cuda_problem() == "helexa was built without CUDA kernels"


def test_a_card_that_is_too_old_says_so(monkeypatch):
    monkeypatch.setattr(module, "EMULATED", False)
    monkeypatch.setattr(ops, "has_cuda", True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in {
        "init": None, "device_count": 1, "get_device_capability": (7, 5), "get_device_name": "T4"
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert cuda_problem(0) == "T4 has compute capability 7.5; the kernels need 8.0"
    assert cuda_problem(1) == "there are 1 CUDA devices, numbered from 0"


def test_a_driver_that_does_not_start_says_so(monkeypatch):
    monkeypatch.setattr(module, "EMULATED", False)
    monkeypatch.setattr(ops, "has_cuda", True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old.\nPlease update it.")

    monkeypatch.setattr(torch.cuda, "init", init)
    assert cuda_problem() == "CUDA does not start: The NVIDIA driver on your system is too old."


def test_the_first_device_with_room_is_taken_and_else_the_cpu(two_gpus, model):
    tensors, config = model

    def place(**options):
        return preflight.place(tensors, config, EngineOptions(**options))[0].device

    assert place(device="auto") == "cuda:0"
    assert place(device="cuda") == "cuda:0"
    assert place(device="cuda:1") == "cuda:1"
    two_gpus["cuda:0"] = 1 << 20
    assert place(device="auto") == "cuda:1"
    two_gpus["cuda:1"] = 1 << 20
    assert place(device="auto") == "cpu"
    with pytest.raises(OutOfMemory, match="bytes more than the"):
        place(device="cuda:1")
    with pytest.raises(InvalidParameter, match="there are 2 CUDA devices"):
        place(device="cuda:2")


def test_prompts_are_computed_in_larger_steps_on_a_device(monkeypatch):
    monkeypatch.setattr(module, "EMULATED", False)
    assert EngineOptions(device="cpu").prefill_tokens == 512
    assert EngineOptions(device="cuda:0").prefill_tokens == 2048
    assert EngineOptions(device="cuda:0", prefill_chunk=100).prefill_tokens == 100


def test_a_workspace_grows_with_what_a_step_computes(model):
    _, config = model
    sizes = [workspace_nbytes(config, EngineOptions(prefill_chunk=chunk)) for chunk in (64, 128)]
    assert sizes[1] - sizes[0] >= 64 * config.intermediate_size * 6


def test_an_allocation_that_fails_in_a_request_is_an_error_of_its_own():
    with pytest.raises(OutOfMemory, match="too little free memory for this request"), request_errors():
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasGemmEx( handle, opa, opb)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    ],
)
def test_memory_that_cublas_is_refused_ends_one_request(words):
    with pytest.raises(OutOfMemory, match="CUBLAS_STATUS"), request_errors():
        raise RuntimeError(words)


@pytest.mark.parametrize("code", [2, 700])
def test_only_refused_memory_is_no_fault_of_the_device(code):
    error = ops.CudaError("launch")
    error.code = code
    with pytest.raises(OutOfMemory if code == 2 else ops.CudaError), request_errors():
        raise error


@pytest.mark.parametrize("code", [2, 719])
def test_errors_of_torch_say_by_their_number_what_they_are(code):
    error = RuntimeError("CUDA error")
    error.error_code = code
    with pytest.raises(OutOfMemory if code == 2 else RuntimeError) as caught, request_errors():
        raise error
    assert isinstance(caught.value, OutOfMemory) == (code == 2)


def test_a_model_that_is_too_wide_for_devices_goes_to_the_cpu_or_is_refused(two_gpus, model, monkeypatch):
    tensors, config = model
    config = dataclasses.replace(config, hidden_size=16448)

    def place(**options):
        return preflight.place(tensors, config, EngineOptions(**options))[0].device

    assert place(device="auto") == "cpu"
    with pytest.raises(UnsupportedModel, match="hidden size is 16448; CUDA devices take up to 16384"):
        place(device="cuda:0")


def test_copies_in_main_memory_are_whole():
    cache = KVCache([(3, 2, 256, 4)], torch.bfloat16)
    cache.k[0].copy_(torch.randn(cache.k[0].shape))
    part = cache.k[0][2, :, :7]
    (copy,) = HostCopy([part]).wait()
    expected = part.clone()
    part.zero_()
    assert copy.is_contiguous()
    assert torch.equal(copy, expected)


class Pool:
    """As torch's streams: each call gives the next one."""

    def __init__(self):
        self.num_taken, self.priorities = 0, set()

    def __call__(self, device, priority):
        self.num_taken += 1
        self.priorities.add(priority)
        return f"stream {self.num_taken}"


def test_threads_have_streams_of_their_own_and_leave_them_to_later_ones(monkeypatch):
    monkeypatch.setattr(module, "EMULATED", False)
    pool, current = Pool(), threading.local()
    monkeypatch.setattr(module, "_streams", {})
    monkeypatch.setattr(torch.cuda, "Stream", pool)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(current, "stream", stream))
    device, found, may_end = Device("cuda:0"), queue.SimpleQueue(), threading.Event()

    def work():
        device.enter()
        found.put(current.stream)
        may_end.wait(10)

    for _ in range(3):  # two at a time, as two models would
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert {found.get(timeout=10) for _ in threads} == {"stream 1", "stream 2"}
        may_end.set()
        for thread in threads:
            thread.join()
        may_end.clear()
    assert pool.priorities == {-1}


@pytest.mark.parametrize(("code", "raised"), [(2, OutOfMemory), (700, ops.CudaError)])
def test_a_launch_without_memory_fails_one_request_and_other_faults_the_device(code, raised):
    error = ops.CudaError("a launch failed")
    error.code = code
    with pytest.raises(raised), request_errors():
        raise error
