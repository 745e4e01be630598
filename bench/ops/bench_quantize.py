"""Encoding a bf16 matrix of Qwen3-0.6B's feed-forward block, in every format there is an encoder for."""

from collections.abc import Iterator
from functools import partial

import numpy as np
from bench.run import Case

from helexa import ops
from helexa.quant import FORMATS

ROWS, COLS = 3072, 1024
SEARCH = {"q4_k": 22 * 15 + 12 * 10, "q5_k": 17 * 15 + 12 * 10, "q6_k": 19 * 8}  # operations a value, about


def cases() -> Iterator[Case]:
    values = np.random.default_rng(0).standard_normal((ROWS, COLS), np.float32) * np.float32(0.02)
    raw = (values.view(np.uint32) >> 16).astype(np.uint16)
    for format in ops.ENCODED:
        nbytes = raw.nbytes + FORMATS[format].nbytes(raw.size)
        run = partial(ops.quantize, "bf16", raw, format)
        yield Case(f"{format} [{ROWS}, {COLS}]", run, float(nbytes), float(SEARCH.get(format, 6) * raw.size))
