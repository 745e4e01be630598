"""Where a model's tensors live: main memory, or the memory of a CUDA device.

Where the CUDA kernels run on the host (ops.tensor.EMULATED), main memory stands for that of a device.
"""

import logging
import re
import threading
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from helexa import ops
from helexa.engine.memory import available_bytes, is_out_of_memory
from helexa.errors import InvalidParameter, OutOfMemory
from helexa.log import fields
from helexa.ops.tensor import EMULATED

logger = logging.getLogger(__name__)

AUTO = "auto"
OLDEST = (8, 0)  # compute capability

_NAME = re.compile(r"cpu|cuda(:\d+)?")


@dataclass(frozen=True, eq=False)
class Claim:
    """Memory of a device that nobody uses now, but whose owner will again; it lasts as long as this does."""

    device: str
    nbytes: int


_claims: "weakref.WeakSet[Claim]" = weakref.WeakSet()


def check_device_name(name: str) -> None:
    """Raises InvalidParameter unless it is one of cpu, cuda, cuda:N and auto."""
    if name != AUTO and not _NAME.fullmatch(name):
        raise InvalidParameter(f"device is {name!r}; expected cpu, cuda:0, cuda:1, … or auto", param="device")


@dataclass(frozen=True)
class Device:
    """`cpu` or `cuda:N`."""

    name: str

    @property
    def is_cuda(self) -> bool:
        """Whether models run through the CUDA kernels."""
        return EMULATED or self.name != "cpu"

    @property
    def has_streams(self) -> bool:
        """Whether work is queued and done later."""
        return self.tensors.type == "cuda"

    @property
    def tensors(self) -> torch.device:
        """Where torch has them."""
        return torch.device("cpu" if EMULATED else self.name)

    def enter(self) -> None:
        """Makes it the calling thread's device, with a stream of the thread's own."""
        if self.has_streams:
            torch.cuda.set_device(self.tensors)
            stream = _take_stream(self)
            torch.cuda.set_stream(stream)
            _thread.seat = _Seat()
            weakref.finalize(_thread.seat, _give_back, self, stream)

    def free_bytes(self) -> int:
        """What can be allocated now; of a CUDA device with what torch holds, and nobody uses or claims."""
        if not self.has_streams:
            return available_bytes()
        free, _ = torch.cuda.mem_get_info(self.tensors)
        idle = torch.cuda.memory_reserved(self.tensors) - torch.cuda.memory_allocated(self.tensors)
        return free + idle - sum(claim.nbytes for claim in list(_claims) if claim.device == self.name)

    def claim(self, nbytes: int) -> Claim:
        """Takes so much of the device's memory in one piece, from which later allocations are cut.

        Without it, steps of different sizes would each leave pieces that do not suit the others.
        """
        claim = Claim(self.name, nbytes if self.has_streams else 0)
        if self.has_streams:
            torch.empty(nbytes, dtype=torch.uint8, device=self.tensors)
            _claims.add(claim)
        return claim

    def staging(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Main memory, zeroed, that the device copies from and to while the host goes on."""
        return torch.zeros(shape, dtype=dtype, pin_memory=self.has_streams)


class _Seat:
    """What a thread that has entered a device holds as long as it lives."""


_thread = threading.local()
_streams: dict[Device, list[torch.cuda.Stream]] = {}  # that no thread has now
_streams_lock = threading.Lock()


def _take_stream(device: Device) -> torch.cuda.Stream:
    """A stream that no other thread that entered the device has, and the threads that bring weights never do.

    torch hands out the same few streams in turn, others for each priority, and what another thread queues on
    a stream that is being captured would become part of the graph. Streams are used again because cuBLAS
    keeps memory for each.
    """
    with _streams_lock:
        free = _streams.setdefault(device, [])
        if free:
            return free.pop()
    return torch.cuda.Stream(device.tensors, priority=-1)  # type: ignore[no-untyped-call]


def _give_back(device: Device, stream: torch.cuda.Stream) -> None:
    with _streams_lock:
        _streams[device].append(stream)


class HostCopy:
    """Copies of tensors in main memory, contiguous, made behind what the calling thread has queued."""

    def __init__(self, tensors: Iterable[Tensor]):
        self._tensors: list[Tensor] = []
        self._event: torch.cuda.Event | None = None
        for tensor in tensors:
            target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            ops.copy_across(target, tensor)
            self._tensors.append(target)
            if tensor.is_cuda and self._event is None:
                self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record()

    def wait(self) -> list[Tensor]:
        """The copies, once they are made; on any thread."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


@contextmanager
def request_errors() -> Iterator[None]:
    """Makes OutOfMemory of an allocation that failed on the device: no fault, it ends one request."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"the device has too little free memory for this request: {error}") from error


def cuda_problem(index: int = 0) -> str | None:
    """Why cuda:index cannot be used, in one sentence; None if it can."""
    if EMULATED:
        return None
    if not ops.has_cuda:
        return "helexa was built without CUDA kernels"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built without CUDA"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that does not fit: that is an error below
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except (RuntimeError, AssertionError) as error:
            return f"CUDA does not start: {str(error).splitlines()[0]}"
        count = torch.cuda.device_count()
        if index >= count:
            return f"there are {count} CUDA devices, numbered from 0"
        capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        name = torch.cuda.get_device_name(index)
        found, oldest = (".".join(map(str, one)) for one in (capability, OLDEST))
        return f"{name} has compute capability {found}; the kernels need {oldest}"
    return None


def wake_cuda() -> str | None:
    """Starts CUDA on all its devices, so that no load has to; what keeps helexa from using them, if so."""
    start = time.perf_counter()
    for device in (found := usable_devices()):
        device.free_bytes()
    if found:
        ops.keep_slots()
        seconds = round(time.perf_counter() - start, 3)
        logger.info("cuda_started", extra=fields(devices=len(found), start_s=seconds))
    return None if found else cuda_problem()


def find_devices(name: str) -> list[Device]:
    """The devices that `name` allows, the best first. Raises InvalidParameter for one that cannot be used."""
    check_device_name(name)
    if name == AUTO:
        return [*usable_devices(), Device("cpu")]
    if name == "cpu":
        return [Device("cpu")]
    device = Device(name if ":" in name else "cuda:0")
    if (problem := cuda_problem(int(device.name.partition(":")[2]))) is not None:
        raise InvalidParameter(f"device is {name!r}, but {problem}", param="device")
    return [device]


def usable_devices() -> list[Device]:
    """The CUDA devices that can be used."""
    if EMULATED:
        return []
    found: list[Device] = []
    with suppress(RuntimeError):
        while cuda_problem(len(found)) is None:
            found.append(Device(f"cuda:{len(found)}"))
    return found
