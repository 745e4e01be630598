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


def cuda_cases() -> Iterator[Case]:
    for num_tokens, width in ((1, 4096), (8, 4096), (64, 5120), (512, 5120), (4096, 5120)):
        weight = torch.randn(width, device="cuda")
        x, residual = (torch.randn(num_tokens, width, device="cuda") for _ in range(2))
        x = x if num_tokens <= ops.MAX_MATVEC_ROWS else x.bfloat16()

        def run(
            x: torch.Tensor = x, weight: torch.Tensor = weight, residual: torch.Tensor = residual
        ) -> None:
            for _ in range(20):
                ops.rms_norm(x, weight, 1e-6, residual=residual)

        values = 20.0 * num_tokens * width
        written = 1.125 if num_tokens <= ops.MAX_MATVEC_ROWS else 2.0
        nbytes = values * (x.element_size() + 8 + written)
        yield Case(f"rms_norm [{num_tokens}, {width}] with residual", run, nbytes, 6.0 * values, 20)
