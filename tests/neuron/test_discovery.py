"""The host, read from files that the test writes."""

import pynvml
import pytest

from helexa.neuron.discovery import _unavailable_reason, device_health, discover

CPUINFO = """processor\t: 0
model name\t: Some CPU @ 3 GHz
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu sse2 avx2 fma avx512f avx512_vnni

processor\t: 1
model name\t: Some CPU @ 3 GHz
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu sse2 avx2 fma avx512f avx512_vnni
"""


@pytest.fixture
def host(tmp_path):
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    (tmp_path / "meminfo").write_text("MemTotal:  8000 kB\nMemAvailable:  6000 kB\nHugePages_Total:  0\n")
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def test_the_processor_is_read_from_proc(host):
    cpu = discover(host, host / "cgroup").cpu
    assert cpu.name == "Some CPU @ 3 GHz"
    assert cpu.cores == 1
    assert cpu.instruction_sets == ["avx2", "fma", "avx512f", "avx512_vnni"]
    assert cpu.memory_total_bytes == 8000 * 1024


def test_a_container_has_the_memory_of_its_limit(host):
    (host / "cgroup" / "memory.max").write_text("4096000\n")
    (host / "cgroup" / "memory.current").write_text("3000000\n")
    assert discover(host, host / "cgroup").cpu.memory_total_bytes == 4096000


def test_a_host_without_proc_still_describes_itself(tmp_path):
    found = discover(tmp_path / "none", tmp_path / "none")
    assert found.cpu.threads >= 1
    assert found.cpu.name
    assert found.cpu.memory_total_bytes == 0


def test_no_gpu_is_nothing_to_explain(host):
    for code in (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED):
        assert _unavailable_reason(pynvml.NVMLError(code), host) is None


def test_a_driver_updated_without_a_reboot_is_one_sentence(host):
    (host / "driver/nvidia").mkdir(parents=True)
    (host / "driver/nvidia/version").write_text("NVRM version: 580.1\nGCC version: 14\n")
    reason = _unavailable_reason(pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH), host)
    assert reason == (
        "the NVIDIA driver was updated without a reboot (the kernel runs NVRM version: 580.1); "
        "reboot this host to use its GPUs"
    )


def test_a_device_that_does_not_answer_leaves_no_telemetry(monkeypatch):
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert device_health() == []
    assert "does not answer" in str(discover().cuda_unavailable_reason)
