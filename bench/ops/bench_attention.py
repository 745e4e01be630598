"""Prompt chunks and decode steps at several depths: Qwen3-0.6B's heads (16 queries, 8 keys, 128 wide), and
on a device those of 8B and 27B."""

from collections.abc import Iterator

import torch
from bench.run import Case, rounds

from helexa import ops

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 16, 8, 128


def case(name: str, num_sequences: int, num_queries: int, depth: int, dtype: torch.dtype) -> Case:
    length = depth + num_queries
    pages_each = -(-length // ops.PAGE_TOKENS)
    shape = (num_sequences * pages_each, NUM_KV_HEADS, ops.PAGE_TOKENS, HEAD_DIM)
    k_cache, v_cache = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    page_table = torch.randperm(shape[0], dtype=torch.int32).view(num_sequences, pages_each)
    query_start = torch.arange(num_sequences + 1, dtype=torch.int32) * num_queries
    kv_lengths = torch.full((num_sequences,), length, dtype=torch.int32)
    q = torch.randn(num_sequences * num_queries, NUM_HEADS, HEAD_DIM)
    out = torch.empty(len(q), NUM_HEADS * HEAD_DIM)
    pairs = num_sequences * num_queries * (depth + (num_queries + 1) / 2)
    return Case(
        name,
        lambda: ops.attention(
            q, k_cache, v_cache, page_table, query_start, kv_lengths, HEAD_DIM**-0.5, out=out
        ),
        2.0 * num_sequences * length * NUM_KV_HEADS * HEAD_DIM * k_cache.element_size(),
        4.0 * pairs * NUM_HEADS * HEAD_DIM,
    )


def cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        label = str(dtype).removeprefix("torch.")
        for depth in (0, 2048, 8192):
            yield case(f"{label} 512 queries at depth {depth}", 1, 512, depth, dtype)
        for depth in (512, 8192, 32768):
            yield case(f"{label} decode at depth {depth}", 1, 1, depth, dtype)
        yield case(f"{label} 4 streams decode at depth 8192", 4, 1, 8192, dtype)
        yield case(f"{label} 4 queries at depth 8192", 1, 4, 8192, dtype)


DEVICE_HEADS = {"8B": (32, 8, 128), "27B": (24, 4, 256), "30B": (32, 4, 128)}


def cuda_cases() -> Iterator[Case]:
    for name, heads in DEVICE_HEADS.items():
        for num_sequences, num_queries, depth in (
            *((1, 1, depth) for depth in (512, 8192, 32768)),
            *((count, 1, 8192) for count in (4, 8)),
            *((1, count, 8192) for count in (4, 8)),
            *((1, 512, depth) for depth in (0, 3584, 8192)),
            (1, 2048, 2048),
        ):
            yield device_case(name, heads, num_sequences, num_queries, depth)


def random_caches(shape: tuple[int, ...], nbytes: float) -> list[list[torch.Tensor]]:
    """Pages of keys and of values on a device, in so many copies that none waits in its cache."""
    return [
        [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        for _ in rounds(nbytes)[:16]
    ]


def device_case(
    name: str, heads: tuple[int, int, int], num_sequences: int, num_queries: int, depth: int
) -> Case:
    num_heads, num_kv_heads, head_dim = heads
    length, tokens = depth + num_queries, num_sequences * num_queries
    pages_each = -(-length // ops.PAGE_TOKENS)
    shape = (num_sequences * pages_each, num_kv_heads, ops.PAGE_TOKENS, head_dim)
    nbytes = 4.0 * num_sequences * length * num_kv_heads * head_dim
    caches = random_caches(shape, nbytes)
    table = torch.randperm(shape[0], dtype=torch.int32).view(num_sequences, pages_each).cuda()
    start = (torch.arange(num_sequences + 1, dtype=torch.int32) * num_queries).cuda()
    lengths = torch.full((num_sequences,), length, dtype=torch.int32).cuda()
    q = torch.randn(tokens, num_heads, head_dim, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        for k_cache, v_cache in caches:
            ops.attention(q, k_cache, v_cache, table, start, lengths, head_dim**-0.5)

    pairs = tokens * (depth + (num_queries + 1) / 2)
    work = 4.0 * pairs * num_heads * head_dim * len(caches)
    label = f"{name} {num_sequences} x {num_queries} queries at depth {depth}"
    return Case(label, run, nbytes * len(caches), work, len(caches))
