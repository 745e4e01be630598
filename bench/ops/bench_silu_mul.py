"""Qwen3-0.6B feed-forward width, one decode row and a prompt chunk; on a device chunks of 8B and 27B."""

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


def cuda_cases() -> Iterator[Case]:
    for num_tokens, width in ((512, 12288), (4096, 12288), (512, 17408)):
        gate_up = torch.randn(num_tokens, 2 * width, device="cuda", dtype=torch.bfloat16)

        def run(gate_up: torch.Tensor = gate_up) -> None:
            for _ in range(10):
                ops.silu_mul(gate_up)

        values = 10.0 * num_tokens * width
        yield Case(f"silu_mul [{num_tokens}, {width}]", run, 6.0 * values, 20.0 * values, 10)
