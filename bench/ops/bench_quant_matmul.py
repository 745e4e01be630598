"""Shapes of a decode step (1..8 rows, weights larger than the last cache) and of a prompt chunk (512
rows)."""

from collections.abc import Iterator

import numpy as np
import torch
from bench.run import Case

from helexa import ops
from helexa.quant import FORMATS

SHAPES = {
    "q4_1": (1536, 576),
    "q8_0": (3072, 1024),
    "q4_k": (6144, 2048),
    "q5_k": (6144, 2048),
    "q6_k": (2048, 6144),
    "q2_k": (6144, 2048),
    "q3_k": (6144, 2048),
    "iq4_nl": (3072, 1024),
    "iq4_xs": (6144, 2048),
}
STREAM_BYTES = 256e6


def weight(format: str, rows: int, cols: int) -> ops.PackedWeight:
    layout = FORMATS[format]
    shape = (rows, cols // layout.block_size * layout.block_bytes)
    return ops.pack_weight(
        format, np.random.default_rng(0).integers(0, 60, shape, dtype=np.uint8), rows, cols
    )


def cases() -> Iterator[Case]:
    for format, (rows, cols) in SHAPES.items():
        first = weight(format, rows, cols)
        nbytes = first.data.numel()
        stream = [first] + [weight(format, rows, cols) for _ in range(int(STREAM_BYTES / nbytes))]
        for tokens in (1, 2, 4, 8):
            x, out, graph = torch.randn(tokens, cols), torch.empty(tokens, rows), ops.CpuGraph()
            with graph.capture():
                for each in stream:
                    ops.quant_matmul(x, [each], out=out)
            work = 2.0 * tokens * rows * cols * len(stream)
            yield Case(f"{format} [{rows}, {cols}] rows {tokens}", graph.replay, nbytes * len(stream), work)
        x, out = torch.randn(512, cols), torch.empty(512, rows)
        yield Case(
            f"{format} [{rows}, {cols}] rows 512",
            lambda x=x, first=first, out=out: ops.quant_matmul(x, [first], out=out),  # type: ignore[misc]
            nbytes + 4.0 * 512 * (rows + cols),
            2.0 * 512 * rows * cols,
        )
