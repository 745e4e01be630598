"""Qwen3-0.6B heads (16 queries, 8 keys, 128 wide): prompt chunks and decode steps at several depths."""

from collections.abc import Iterator

import torch
from bench.run import Case

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
    out = torch.empty_like(q)
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
