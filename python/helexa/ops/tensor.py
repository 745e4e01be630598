"""What every op needs to hand a tensor to the extension: checks, dtype numbers, streams."""

import torch
from torch import Tensor

from helexa import _C

# Set where the extension runs its CUDA kernels on the host, thread by thread, for tests: CPU tensors then stand for those of
# a device.
EMULATED: bool = getattr(_C, "cuda_is_emulated", False)

DTYPE_IDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/core/float_types.h


def check(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def dtype_id(x: Tensor) -> int:
    """The extension's number of x.dtype; raises ValueError for dtypes that no kernel takes."""
    check(x.dtype in DTYPE_IDS, f"dtype {x.dtype} is not one of float32, float16, bfloat16")
    return DTYPE_IDS[x.dtype]


def on_cuda(x: Tensor) -> bool:
    """Whether an op on x is the CUDA kernels' business."""
    return x.is_cuda or EMULATED


def stream(x: Tensor) -> int:
    """The handle of torch's current CUDA stream on x's device."""
    if EMULATED:
        return 0
    return torch.cuda.current_stream(x.device).cuda_stream
