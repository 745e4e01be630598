"""Shapes of a decode step (few rows, weights larger than the last cache) and of a prompt chunk (many)."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from bench.run import Case, rounds

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


# What a layer multiplies by in one launch: the rows of each matrix, and the columns that they share.
DEVICE_SHAPES = {
    "8B qkv": (("q4_k", "q4_k", "q6_k"), (4096, 1024, 1024), 4096),
    "8B o": (("q4_k",), (4096,), 4096),
    "8B down": (("q4_k",), (4096,), 12288),
    "8B best down": (("q6_k",), (4096,), 12288),
    "8B head": (("q6_k",), (151936,), 4096),
    "27B linear in": (("q4_k", "q4_k", "q8_0", "q8_0"), (10240, 6144, 48, 48), 5120),
    "27B down": (("q4_k",), (5120,), 17408),
    "0.6B qkv": (("q8_0", "q8_0", "q8_0"), (2048, 1024, 1024), 1024),
    "0.6B down": (("q8_0",), (1024,), 3072),
}
GATED_SHAPES = {"8B": ("q4_k", 12288, 4096), "27B": ("q4_k", 17408, 5120), "0.6B": ("q8_0", 3072, 1024)}

# Around the numbers of rows from which other kernels take over, ops.MAX_MATVEC_ROWS and MAX_MIDDLE_ROWS.
ROWS = (1, 2, 4, 8, 16, 17, 32, 64, 96, 128, 192, 256, 384, 512, 4096)


def device_weight(format: str, rows: int, cols: int, seed: int) -> ops.PackedWeight:
    """A random matrix, made on the device: every byte pattern is a weight, and none changes the speed."""
    packed = ops.empty_packed(format, rows, cols, device="cuda")
    generator = torch.Generator("cuda").manual_seed(seed)
    packed.data.random_(0, 60, generator=generator)
    return packed


def cuda_cases() -> Iterator[Case]:
    for name, (formats, rows, cols) in DEVICE_SHAPES.items():
        first = [device_weight(*matrix, cols, 0) for matrix in zip(formats, rows, strict=True)]
        nbytes = sum(weight.data.numel() for weight in first)
        stream = [first] + [
            [device_weight(*matrix, cols, index) for matrix in zip(formats, rows, strict=True)]
            for index in rounds(nbytes)[1:]
        ]
        yield from _row_cases(f"{name} {'+'.join(dict.fromkeys(formats))}", ops.quant_matmul, stream, nbytes)
    for name, (format, inner, cols) in GATED_SHAPES.items():
        first = [device_weight(format, inner, cols, index) for index in range(2)]
        nbytes = sum(weight.data.numel() for weight in first)
        stream = [[device_weight(format, inner, cols, index) for index in range(2)] for _ in rounds(nbytes)]
        yield from _row_cases(f"{name} gate·up {format}", ops.gated_matmul, stream, nbytes)


def _row_cases(
    name: str, op: Callable[..., object], stream: list[list[ops.PackedWeight]], nbytes: int
) -> Iterator[Case]:
    rows, cols = sum(weight.rows for weight in stream[0]), stream[0][0].cols
    for tokens in ROWS:
        if tokens > 64 and "head" in name:
            continue
        used = stream if tokens <= 512 else stream[:2]
        x = activation(tokens, cols)

        def run(x: ops.Activation = x, used: list[list[ops.PackedWeight]] = used) -> None:
            for weights in used:
                op(x, weights)

        work = 2.0 * tokens * rows * cols * len(used)
        yield Case(f"{name} [{rows}, {cols}] rows {tokens}", run, float(nbytes * len(used)), work, len(used))


def activation(tokens: int, cols: int) -> ops.Activation:
    """Random rows in the form that matmuls of so many take."""
    x = torch.randn(tokens, cols, device="cuda")
    if tokens > ops.MAX_MATVEC_ROWS:
        return ops.Activation(cols, bf16=x.bfloat16())
    return ops.quantize_rows(x)
