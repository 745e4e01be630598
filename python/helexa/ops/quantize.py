"""Float weights to the block formats of files, as csrc/ops/quantize_isa.cpp describes."""

import numpy as np
from numpy.typing import NDArray

from helexa import _C
from helexa.ops.pack import FORMAT_IDS
from helexa.ops.tensor import check
from helexa.quant import FORMATS

ENCODED = ("q8_0", "q4_0", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")
FLOATS = ("f32", "f16", "bf16")


def quantize(source_format: str, raw: object, format: str) -> NDArray[np.uint8]:
    """The numbers of `raw`, a buffer in one of FLOATS, as blocks of one of ENCODED, uint8 [nbytes].

    The same blocks come from any number of threads and on any processor. Raises ValueError if the numbers do
    not fill whole blocks or one is NaN or beyond ±500000.
    """
    view = np.frombuffer(raw, dtype=np.uint8)  # type: ignore[call-overload]
    check(source_format in FLOATS, f"{source_format!r} is not one of {', '.join(FLOATS)}")
    check(format in ENCODED, f"there is no encoder for {format!r}, only for {', '.join(ENCODED)}")
    source, target = FORMATS[source_format], FORMATS[format]
    num_values, rest = divmod(view.size, source.block_bytes)
    check(rest == 0, f"{view.size} bytes are no whole numbers of {source_format}")
    blocks, num_bad = np.empty(target.nbytes(num_values), np.uint8), np.zeros(1, np.int64)
    _C.quantize_cpu(
        FORMAT_IDS[source_format],
        view.ctypes.data,
        num_values,
        FORMAT_IDS[format],
        blocks.ctypes.data,
        num_bad.ctypes.data,
    )
    check(num_bad[0] == 0, f"{num_bad[0]} values are not finite or too large for {format}")
    return blocks
