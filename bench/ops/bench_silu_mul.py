"""Qwen3-0.6B feed-forward width: one decode row and a prompt chunk."""

from collections.abc import Iterator

import torch
from bench.run import Case

from helexa import ops

WIDTH = 3072


def cases() -> Iterator[Case]:
    for num_tokens in (1, 8, 512):
        gate_up, out = torch.randn(num_tokens, 2 * WIDTH), torch.empty(num_tokens, WIDTH)
        graph = ops.CpuGraph()
        with graph.capture():
            ops.silu_mul(gate_up, out=out)
        values = float(num_tokens * WIDTH)
        yield Case(f"silu_mul [{num_tokens}, {WIDTH}]", graph.replay, 12.0 * values, 20.0 * values)
