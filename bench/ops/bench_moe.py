"""A whole mixture of experts: a small one on the CPU, those of 30B-A3B and 35B-A3B on a device."""

from collections.abc import Iterator

import numpy as np
import torch
from bench.run import Case, rounds

from helexa import ops
from helexa.quant import FORMATS

# experts, width of each, hidden size, whether one is shared; 8 are used
SHAPES = {
    "small": (64, 512, 1024, True),
    "30B-A3B": (128, 768, 2048, False),
    "35B-A3B": (256, 512, 2048, True),
}
USED = 8


def weight(format: str, rows: int, cols: int, device: str) -> ops.PackedWeight:
    """A random matrix; floats are small, and of the others every byte pattern is one."""
    if format == "f32":
        raw = (torch.randn(rows, cols) * 0.02).numpy()
        return ops.pack_weight(format, raw, rows, cols, device=device)
    if device == "cuda":
        packed = ops.empty_packed(format, rows, cols, device=device)
        packed.data.random_(0, 60)
        return packed
    shape = (rows, FORMATS[format].nbytes(cols))
    return ops.pack_weight(
        format, np.random.default_rng(0).integers(0, 60, shape, dtype=np.uint8), rows, cols
    )


def case(name: str, num_tokens: int, down_format: str, device: str) -> Case:
    num_experts, size, hidden, has_shared = SHAPES[name]
    router = weight("f32", num_experts, hidden, device)
    gate_up = [weight("q4_k", num_experts * size, hidden, device) for _ in range(2)]
    down = weight(down_format, num_experts * hidden, size, device)
    shared = None
    if has_shared:
        both = [weight("q4_k", size, hidden, device) for _ in range(2)]
        shared = ops.SharedExpert(
            both, weight(down_format, hidden, size, device), weight("f32", 1, hidden, device)
        )
    stacks = sum(stack.data.numel() for stack in (*gate_up, down))
    used = num_experts * (1 - (1 - USED / num_experts) ** num_tokens)  # expected, of random tokens
    nbytes = stacks * used / num_experts + router.data.numel()
    turns = rounds(nbytes)[:64] if device == "cuda" else range(1)
    inputs = [rows(num_tokens, hidden, device) for _ in turns]

    def run() -> None:
        for x in inputs:
            ops.sparse_moe(x, router, gate_up, down, top_k=USED, normalize=True, shared=shared)

    work = 6.0 * num_tokens * (USED + has_shared) * size * hidden
    label = f"{name} {down_format} down, {num_tokens} tokens"
    return Case(label, run, nbytes * len(turns), work * len(turns), len(turns))


def rows(num_tokens: int, hidden: int, device: str) -> ops.Rows:
    x = torch.randn(num_tokens, hidden, device=device)
    if device == "cpu":
        return x
    if num_tokens > ops.MAX_MATVEC_ROWS:
        return ops.Activation(hidden, bf16=x.bfloat16(), x=x)
    return ops.Activation(hidden, q8=ops.quantize_rows(x).q8, x=x)


def cases() -> Iterator[Case]:
    for num_tokens in (1, 4, 512):
        yield case("small", num_tokens, "q6_k", "cpu")


def cuda_cases() -> Iterator[Case]:
    for name in ("30B-A3B", "35B-A3B"):
        for num_tokens in (1, 2, 4, 8, 128, 512, 4096):
            yield case(name, num_tokens, "q4_k", "cuda")
        yield case(name, 1, "q6_k", "cuda")
