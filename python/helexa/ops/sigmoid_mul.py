"""The output gate of attention in Qwen3-Next and its successors; on CUDA `attention` applies it."""

import torch
from torch import Tensor

from helexa import _C
from helexa.ops.tensor import check


def sigmoid_mul(x: Tensor, gate: Tensor) -> Tensor:
    """x · sigmoid(gate), in place; returns x.

    x, gate: float32, contiguous, of one shape, no overlap.
    Raises ValueError if a shape or dtype does not fit.  Capturable: allocates nothing.
    """
    for name, tensor in (("x", x), ("gate", gate)):
        check(
            tensor.shape == x.shape and tensor.dtype == torch.float32 and tensor.is_contiguous(),
            f"sigmoid_mul: {name} {tuple(tensor.shape)} {tensor.dtype} is not a contiguous "
            f"{tuple(x.shape)} float32",
        )
        check(tensor.device.type == "cpu", f"sigmoid_mul: {name} is on {tensor.device}, expected the CPU")
    _C.sigmoid_mul_cpu(x.data_ptr(), gate.data_ptr(), x.numel())
    return x


def sigmoid_mul_reference(x: Tensor, gate: Tensor) -> Tensor:
    """The same in torch, in place as well."""
    return x.mul_(gate.sigmoid())
