"""What every op needs to hand a tensor to the extension: checks, dtype numbers, streams."""

from collections.abc import Callable

import torch
from torch import Tensor

from helexa import _C

# Set where the extension runs its CUDA kernels on the host, thread by thread, for tests: CPU tensors then
# stand for those of a device.
EMULATED: bool = getattr(_C, "cuda_is_emulated", False)

DTYPE_IDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/core/float_types.h


def check(condition: bool, message: str | Callable[[], str]) -> None:
    """Raises ValueError(message) unless the condition holds; a message with values is made only then."""
    if not condition:
        raise ValueError(message if isinstance(message, str) else message())


def check_tensor(op: str, name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises ValueError unless x, which `op` calls `name`, is contiguous and has this shape and dtype."""
    if x.shape != shape or x.dtype != dtype or not x.is_contiguous():
        raise ValueError(f"{op}: {name} {tuple(x.shape)} {x.dtype} is not a contiguous {shape} {dtype}")


def check_device(op: str, name: str, x: Tensor, like: Tensor) -> None:
    """Raises ValueError unless x, which `op` calls `name`, is on the device of `like`."""
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, expected {like.device}")


def dtype_id(x: Tensor) -> int:
    """The extension's number of x.dtype; raises ValueError for dtypes that no kernel takes."""
    number = DTYPE_IDS.get(x.dtype)
    if number is None:
        raise ValueError(f"dtype {x.dtype} is not one of float32, float16, bfloat16")
    return number


def address(x: Tensor | None) -> int:
    """Where the values of x are; 0 if there is none."""
    return 0 if x is None else x.data_ptr()


def on_cuda(x: Tensor) -> bool:
    """Whether an op on x is the CUDA kernels' business."""
    return EMULATED or x.is_cuda


def stream(x: Tensor) -> int:
    """The handle of torch's current CUDA stream on x's device."""
    # torch.cuda.current_stream makes an object for it, which takes as long as a launch.
    return 0 if EMULATED else torch._C._cuda_getCurrentRawStream(x.get_device())
