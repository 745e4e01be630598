"""What this host is: processor, memory and CUDA devices, from /proc, cgroups and NVML, without torch.

A driver that does not work is one sentence in the answer; the processor stays usable.
"""

import logging
import os
import platform
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pynvml  # type: ignore[import-untyped]

from helexa.engine import memory
from helexa.wire.control import Cpu, Device, DeviceHealth, Discovery

logger = logging.getLogger(__name__)

_INSTRUCTION_SETS = (
    "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
_NO_GPU = (
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
    pynvml.NVML_ERROR_NO_PERMISSION,
)


def discover(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Discovery:
    """The facts that do not change while the process runs. Never raises."""
    devices, driver, cuda, reason = _cuda_devices(proc)
    return Discovery(
        hostname=socket.gethostname(),
        os=_os_name(),
        kernel=platform.release(),
        cpu=_cpu(proc, cgroup),
        devices=devices,
        driver_version=driver,
        cuda_version=cuda,
        cuda_unavailable_reason=reason,
    )


def device_health() -> list[DeviceHealth]:
    """Memory, load and temperature of the CUDA devices now; a device that does not answer is left out."""
    found: list[DeviceHealth] = []
    with suppress(pynvml.NVMLError), _nvml():
        for index in range(pynvml.nvmlDeviceGetCount()):
            with suppress(pynvml.NVMLError):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                sizes = pynvml.nvmlDeviceGetMemoryInfo(handle)
                found.append(
                    DeviceHealth(
                        index=index,
                        memory_used_bytes=int(sizes.used),
                        memory_free_bytes=int(sizes.free),
                        utilization_percent=_optional(_utilization, handle),
                        temperature_c=_optional(_temperature, handle),
                    )
                )
    return found


def _cuda_devices(proc: Path) -> tuple[list[Device], str | None, str | None, str | None]:
    """Devices, driver version, CUDA version, and why there are none although a driver is there."""
    try:
        with _nvml():
            driver = _text(pynvml.nvmlSystemGetDriverVersion())
            cuda = pynvml.nvmlSystemGetCudaDriverVersion()
            devices = [_device(index) for index in range(pynvml.nvmlDeviceGetCount())]
            return devices, driver, f"{cuda // 1000}.{cuda % 1000 // 10}", None
    except pynvml.NVMLError as error:
        return [], None, None, _unavailable_reason(error, proc)


def _unavailable_reason(error: pynvml.NVMLError, proc: Path) -> str | None:
    """One sentence on what is wrong with the driver; None if there is simply no GPU."""
    code = getattr(error, "value", None)
    if code == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        loaded = _first_line(proc / "driver/nvidia/version")
        kernel = f" (the kernel runs {loaded})" if loaded else ""
        return f"the NVIDIA driver was updated without a reboot{kernel}; reboot this host to use its GPUs"
    if code in _NO_GPU:
        return None
    return f"the NVIDIA driver does not answer: {error}"


def _device(index: int) -> Device:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Device(
        index=index,
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        memory_total_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        compute_capability=f"{major}.{minor}",
    )


@contextmanager
def _nvml() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _utilization(handle: Any) -> int:
    return int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)


def _temperature(handle: Any) -> int:
    return int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))


def _optional(read: Callable[[Any], int], handle: Any) -> int | None:
    try:
        return read(handle)
    except pynvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _cpu(proc: Path, cgroup: Path) -> Cpu:
    packages: set[tuple[str, str]] = set()
    name, flags, package = "", set[str](), ""
    for line in _lines(proc / "cpuinfo"):
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name" and not name:
            name = value
        elif key in ("flags", "Features") and not flags:
            flags = set(value.split())
        elif key == "physical id":
            package = value
        elif key == "core id":
            packages.add((package, value))
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Cpu(
        name=name or platform.processor() or platform.machine(),
        cores=min(len(packages) or threads, threads),
        threads=threads,
        instruction_sets=[known for known in _INSTRUCTION_SETS if known in flags],
        memory_total_bytes=memory.total_bytes(proc, cgroup),
    )


def _os_name() -> str:
    with suppress(OSError):
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    return platform.system()


def _first_line(path: Path) -> str:
    return next(iter(_lines(path)), "").strip()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
