"""Qwen3-0.6B width: one decode row, and a prompt chunk with its residual."""

from collections.abc import Iterator

import torch
from bench.run import Case

from helexa import ops

WIDTH = 1024


def cases() -> Iterator[Case]:
    weight = torch.randn(WIDTH)
    for num_tokens in (1, 8, 512):
        x, residual = torch.randn(num_tokens, WIDTH), torch.randn(num_tokens, WIDTH)
        out = torch.empty_like(x)
        graph = ops.CpuGraph()
        with graph.capture():
            ops.rms_norm(x, weight, 1e-6, residual=residual, out=out)
        values = float(num_tokens * WIDTH)
        yield Case(
            f"rms_norm [{num_tokens}, {WIDTH}] with residual", graph.replay, 16.0 * values, 6.0 * values
        )
