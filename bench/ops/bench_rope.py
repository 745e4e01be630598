"""Qwen3-0.6B heads with a norm each: one decode row, a prompt chunk, and the table that all layers share."""

from collections.abc import Iterator

import torch
from bench.run import Case

from helexa import ops

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 16, 8, 128


def cases() -> Iterator[Case]:
    inv_freq = 1e6 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    norm = torch.randn(HEAD_DIM)
    shape = (3, NUM_KV_HEADS, ops.PAGE_TOKENS, HEAD_DIM)
    k_cache, v_cache = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16)
    for num_tokens in (1, 8, 512):
        positions = torch.arange(num_tokens, dtype=torch.int32)
        table = torch.empty(num_tokens, HEAD_DIM // 2, 2)
        qkv = torch.randn(num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
        q = torch.empty(num_tokens, NUM_HEADS, HEAD_DIM)
        make_table, append = ops.CpuGraph(), ops.CpuGraph()
        with make_table.capture():
            ops.rope_table(positions, inv_freq, out=table)
        with append.capture():
            ops.rope_append(
                qkv,
                table,
                positions,
                k_cache,
                v_cache,
                num_heads=NUM_HEADS,
                q_norm=norm,
                k_norm=norm,
                eps=1e-6,
                interleaved=False,
                out=q,
            )
        angles = float(table.numel() / 2)
        yield Case(f"rope_table {num_tokens} tokens", make_table.replay, 8.0 * angles, 2.0 * angles)
        moved = 4.0 * (qkv.numel() + q.numel()) + 2.0 * num_tokens * 2 * NUM_KV_HEADS * HEAD_DIM
        yield Case(f"rope_append {num_tokens} tokens", append.replay, moved, 10.0 * qkv.numel())
