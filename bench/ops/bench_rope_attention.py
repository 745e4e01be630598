"""Decode steps and verification in one launch and in two, with the heads of several Qwen3 models."""

from collections.abc import Iterator

import torch
from bench.ops.bench_attention import random_caches
from bench.run import Case

from helexa import ops

HEADS = {"0.6B": (16, 8, 128), "8B": (32, 8, 128), "27B": (24, 4, 256), "30B": (32, 4, 128)}


def cuda_cases() -> Iterator[Case]:
    for name, heads in HEADS.items():
        for num_sequences, num_queries, depth in (
            (1, 1, 1),
            (1, 1, 512),
            (1, 1, 8192),
            (1, 4, 8192),
            (8, 1, 8192),
        ):
            for in_one in (True, False):
                yield device_case(name, heads, num_sequences, num_queries, depth, in_one)


def device_case(
    name: str, heads: tuple[int, int, int], num_sequences: int, num_queries: int, depth: int, in_one: bool
) -> Case:
    num_heads, num_kv_heads, head_dim = heads
    length, tokens = depth + num_queries, num_sequences * num_queries
    pages_each = -(-length // ops.PAGE_TOKENS)
    shape = (num_sequences * pages_each, num_kv_heads, ops.PAGE_TOKENS, head_dim)
    nbytes = 4.0 * num_sequences * length * num_kv_heads * head_dim
    caches = random_caches(shape, nbytes)
    page_table = torch.randperm(shape[0], dtype=torch.int32).view(num_sequences, pages_each)
    positions = torch.arange(length - num_queries, length, dtype=torch.int32)
    pages = page_table[:, (positions // ops.PAGE_TOKENS).long()]
    slots = (pages * ops.PAGE_TOKENS + positions % ops.PAGE_TOKENS).flatten().int().cuda()
    inv_freq = 1e6 ** -(torch.arange(0, 128, 2) / 128)
    table = ops.rope_table(positions.repeat(num_sequences).cuda(), inv_freq.cuda())
    starts = (torch.arange(num_sequences + 1, dtype=torch.int32) * num_queries).cuda()
    lengths = torch.full((num_sequences,), length, dtype=torch.int32).cuda()
    qkv = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim, device="cuda")
    norm, page_table = torch.ones(head_dim, device="cuda"), page_table.cuda()
    tables, scale = (page_table, starts, lengths), head_dim**-0.5

    def run() -> None:
        for k_cache, v_cache in caches:
            append = (qkv, table, slots, k_cache, v_cache)
            norms = {"q_norm": norm, "k_norm": norm, "eps": 1e-6, "interleaved": False}
            if in_one:
                ops.rope_attention(*append, *tables, scale, num_heads=num_heads, **norms)
            else:
                q = ops.rope_append(*append, num_heads=num_heads, **norms)
                ops.attention(q, k_cache, v_cache, *tables, scale)

    work = 4.0 * tokens * (depth + (num_queries + 1) / 2) * num_heads * head_dim * len(caches)
    label = f"{name} {num_sequences} x {num_queries} at {depth}, {'one launch' if in_one else 'two launches'}"
    return Case(label, run, nbytes * len(caches), work, len(caches))
