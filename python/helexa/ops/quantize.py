"""Float weights to the block formats of files, as csrc/ops/quantize_isa.cpp describes."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from helexa import _C
from helexa.ops.pack import FORMAT_IDS
from helexa.ops.tensor import check, stream
from helexa.quant import FORMATS

ENCODED = ("q8_0", "q4_0", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")
FLOATS = ("f32", "f16", "bf16")


def quantize(source_format: str, raw: object, format: str) -> NDArray[np.uint8]:
    """The numbers of `raw`, a buffer in one of FLOATS, as blocks of one of ENCODED, uint8 [nbytes].

    The same blocks come from any number of threads and on any processor. Raises ValueError if the numbers do
    not fill whole blocks or one is NaN or beyond ±500000.
    """
    view = np.frombuffer(raw, dtype=np.uint8)  # type: ignore[call-overload]
    num_values = _num_values(source_format, view.size, format)
    blocks, num_bad = np.empty(FORMATS[format].nbytes(num_values), np.uint8), np.zeros(1, np.int64)
    _C.quantize_cpu(
        FORMAT_IDS[source_format],
        view.ctypes.data,
        num_values,
        FORMAT_IDS[format],
        blocks.ctypes.data,
        num_bad.ctypes.data,
    )
    check(num_bad[0] == 0, unfit_words(int(num_bad[0]), format))
    return blocks


def quantize_on_device(source_format: str, raw: Tensor, format: str) -> Tensor:
    """The same blocks of a tensor of bytes on a CUDA device, uint8 [nbytes] there; waits for them."""
    num_values = _num_values(source_format, raw.nbytes, format)
    check(raw.data_ptr() % 16 == 0, "the numbers begin at no multiple of 16 bytes")
    blocks = torch.empty(FORMATS[format].nbytes(num_values), dtype=torch.uint8, device=raw.device)
    num_bad = torch.zeros(1, dtype=torch.int64, device=raw.device)
    queue_blocks(source_format, raw, format, blocks, num_bad)
    check(not num_bad.item(), lambda: unfit_words(int(num_bad.item()), format))
    return blocks


def queue_blocks(source_format: str, raw: Tensor, format: str, blocks: Tensor, num_bad: Tensor) -> None:
    """Queues the same on the current stream; num_bad, [1] int64, grows by what cannot be encoded."""
    _C.quantize_cuda(
        FORMAT_IDS[source_format],
        raw.data_ptr(),
        _num_values(source_format, raw.nbytes, format),
        FORMAT_IDS[format],
        blocks.data_ptr(),
        num_bad.data_ptr(),
        stream(raw),
    )


def unfit_words(count: int, format: str) -> str:
    """Why values cannot be quantized."""
    return f"{count} values are not finite or too large for {format}"


def _num_values(source_format: str, nbytes: int, format: str) -> int:
    check(source_format in FLOATS, f"{source_format!r} is not one of {', '.join(FLOATS)}")
    check(format in ENCODED, f"there is no encoder for {format!r}, only for {', '.join(ENCODED)}")
    num_values, rest = divmod(nbytes, FORMATS[source_format].block_bytes)
    check(rest == 0, f"{nbytes} bytes are no whole numbers of {source_format}")
    return num_values
