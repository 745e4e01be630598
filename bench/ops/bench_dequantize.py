"""Unpacking of weights on a device to bfloat16, packing of the file's rows, products of many rows, and
rows that are looked up on the device and in main memory."""

from collections.abc import Iterator

import torch
from bench.ops.bench_quant_matmul import device_weight
from bench.run import Case, rounds

from helexa import ops

FORMATS = ("q4_0", "q8_0", "q4_k", "q5_k", "q6_k", "q2_k", "q3_k", "iq4_xs")
SHAPE = (4096, 4096)
PRODUCTS = {  # rows of each matrix, and the columns that they share
    "8B qkv": ((4096, 1024, 1024), 4096),
    "8B gate up": ((12288, 12288), 4096),
    "8B down": ((4096,), 12288),
    "27B gate up": ((17408, 17408), 5120),
    "27B down": ((5120,), 17408),
}


def cuda_cases() -> Iterator[Case]:
    rows, cols = SHAPE
    for format in FORMATS:
        weights = [device_weight(format, rows, cols, 0)]
        nbytes = weights[0].data.numel() + 2 * rows * cols
        weights += [device_weight(format, rows, cols, index) for index in rounds(nbytes)[1:]]
        outs = [torch.empty(rows, cols, dtype=torch.bfloat16, device="cuda") for _ in weights]

        def unpack(weights: list[ops.PackedWeight] = weights, outs: list[torch.Tensor] = outs) -> None:
            for weight, out in zip(weights, outs, strict=True):
                ops.dequantize_rows(weight, 0, rows, out)

        count = len(weights)
        yield Case(f"unpack {format} {list(SHAPE)}", unpack, float(nbytes * count), 0.0, count)
        raw = torch.empty(weights[0].data.numel(), dtype=torch.uint8, device="cuda")

        def pack(
            weights: list[ops.PackedWeight] = weights, raw: torch.Tensor = raw, format: str = format
        ) -> None:
            for weight in weights:
                ops.pack_rows(format, raw, 0, rows, weight)

        yield Case(f"pack {format} {list(SHAPE)}", pack, 2.0 * raw.numel() * count, 0.0, count)
    yield from lookups()
    for name, (each, cols) in PRODUCTS.items():
        first = [device_weight("q4_k", rows, cols, index) for index, rows in enumerate(each)]
        nbytes = sum(weight.data.numel() for weight in first)
        stream = [first] + [
            [device_weight("q4_k", rows, cols, index) for rows in each] for index in rounds(nbytes)[1:]
        ]
        for num_tokens in (128, 512, 2048, 4096):
            x = torch.randn(num_tokens, cols, device="cuda", dtype=torch.bfloat16)
            out = torch.empty(num_tokens, sum(each), device="cuda", dtype=torch.bfloat16)

            def multiply(
                x: torch.Tensor = x, out: torch.Tensor = out, stream: list[list[ops.PackedWeight]] = stream
            ) -> None:
                for weights in stream:
                    ops.unpacked_matmul(x, weights, None, out)

            work = 2.0 * num_tokens * sum(each) * cols * len(stream)
            yield Case(
                f"{name} q4_k rows {num_tokens}", multiply, float(nbytes * len(stream)), work, len(stream)
            )


def lookups() -> Iterator[Case]:
    rows, cols = 151_936, 4096
    packed = device_weight("q4_k", rows, cols, 0)
    table = ops.empty_table("q4_k", rows, cols, torch.device("cuda", 0))
    table.data.fill_(1)
    loader = ops.WeightLoader("cuda:0")
    loader.pin(table, "table")
    loader.finish(lambda nbytes: None)
    for num_tokens in (1, 8, 128, 4096):
        ids = torch.randint(0, rows, (num_tokens,), dtype=torch.int32, device="cuda")
        out = torch.empty(num_tokens, cols, device="cuda")
        nbytes = num_tokens * table.data.nbytes / rows
        for name, weight in (("device", packed), ("main memory", table)):

            def look_up(
                ids: torch.Tensor = ids,
                weight: ops.PackedWeight | ops.RowTable = weight,
                out: torch.Tensor = out,
            ) -> None:
                ops.embedding(ids, weight, out=out)

            yield Case(f"look up in {name}, rows {num_tokens}", look_up, nbytes, 0.0)
