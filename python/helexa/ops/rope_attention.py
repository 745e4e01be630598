"""The attention of a layer, from what its matmul of q, k and v left to the input of the next."""

import torch
from torch import Tensor

from helexa import _C
from helexa.ops.activation import MAX_MATVEC_ROWS, Rows
from helexa.ops.attention import (
    CACHE_DTYPE_IDS,
    Unappended,
    attention,
    attention_on_cuda,
    check_attention,
    check_gate,
)
from helexa.ops.rope import check_append, rope_append
from helexa.ops.tensor import check, on_cuda

_MAX_DECODE_ROWS = 64  # csrc/ops/attention_split.cuh


def rope_attention(
    qkv: Tensor,
    table: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    kv_lengths: Tensor,
    scale: float,
    *,
    num_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    interleaved: bool,
    gate: Tensor | None = None,
    rows: slice = slice(None),
) -> Rows:
    """`attention` over the cache to which `rope_append` has added the keys and values of qkv: [R, H · D].

    On CUDA it is one launch in steps of few tokens, with the same result to the bit; every slot that is not
    negative must then be that of its token's position in page_table, and kv_lengths count all queries.
    """
    if not _is_one_launch(qkv, k_cache, num_heads):
        q = rope_append(
            qkv,
            table,
            slots,
            k_cache,
            v_cache,
            num_heads=num_heads,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
            interleaved=interleaved,
        )  # [T, H, D]
        return attention(
            q, k_cache, v_cache, page_table, query_start, kv_lengths, scale, gate=gate, rows=rows
        )
    op, tables = "rope_attention", (page_table, query_start, kv_lengths)
    check_append(op, qkv, table, slots, k_cache, v_cache, num_heads, q_norm, k_norm)
    check_attention(op, qkv, num_heads, k_cache, tables)
    first_row, end_row, step = rows.indices(len(qkv))
    check(step == 1, lambda: f"{op}: {rows} leaves rows out")
    end_row = max(first_row, end_row)
    check_gate(op, gate, (end_row - first_row, num_heads * k_cache.shape[3]), qkv)
    unappended = Unappended(table, slots, num_heads, q_norm, k_norm, eps, interleaved)
    wanted = slice(first_row, end_row)
    return attention_on_cuda(qkv, k_cache, v_cache, tables, scale, gate, wanted, None, unappended)


def _is_one_launch(qkv: Tensor, k_cache: Tensor, num_heads: int) -> bool:
    if not on_cuda(qkv) or k_cache.ndim != 4 or k_cache.dtype not in CACHE_DTYPE_IDS:
        return False
    num_tokens, num_kv_heads = len(qkv), max(k_cache.shape[1], 1)
    return (
        0 < num_tokens <= MAX_MATVEC_ROWS
        and num_tokens * (num_heads // num_kv_heads) <= _MAX_DECODE_ROWS
        and qkv.dtype == torch.float32
        and _C.is_attention_tiled(k_cache.shape[3], CACHE_DTYPE_IDS[k_cache.dtype])
    )
