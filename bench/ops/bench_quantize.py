"""Encoding a bf16 matrix of Qwen3-0.6B's feed-forward block, in every format there is an encoder for."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from bench.run import Case

from helexa import ops
from helexa.ops.quantize import queue_blocks
from helexa.quant import FORMATS

ROWS, COLS = 3072, 1024
SEARCH = {"q4_k": 22 * 15 + 12 * 10, "q5_k": 17 * 15 + 12 * 10, "q6_k": 19 * 8}  # operations a value, about


PART_BYTES = 8 << 20  # that a load sends to a device at once


def cuda_cases() -> Iterator[Case]:
    values = np.random.default_rng(0).standard_normal(PART_BYTES // 2, np.float32) * np.float32(0.02)
    numbers = (values.view(np.uint32) >> 16).astype(np.uint16)
    raw = torch.from_numpy(numbers.view(np.uint8)).cuda()
    num_bad = torch.zeros(1, dtype=torch.int64, device="cuda")
    for format in ops.ENCODED:
        blocks = torch.empty(FORMATS[format].nbytes(values.size), dtype=torch.uint8, device="cuda")
        run = partial(queue_blocks, "bf16", raw, format, blocks, num_bad)
        nbytes, work = raw.nbytes + blocks.nbytes, SEARCH.get(format, 6) * values.size
        yield Case(f"{format} of {PART_BYTES >> 20} MiB", run, float(nbytes), float(work))


def cases() -> Iterator[Case]:
    values = np.random.default_rng(0).standard_normal((ROWS, COLS), np.float32) * np.float32(0.02)
    raw = (values.view(np.uint32) >> 16).astype(np.uint16)
    for format in ops.ENCODED:
        nbytes = raw.nbytes + FORMATS[format].nbytes(raw.size)
        run = partial(ops.quantize, "bf16", raw, format)
        yield Case(f"{format} [{ROWS}, {COLS}]", run, float(nbytes), float(SEARCH.get(format, 6) * raw.size))
