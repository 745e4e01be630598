"""Causal attention over a paged cache, for prefill and decode (Dao et al. 2022; pages: Kwon et al. 2023)."""

import torch
from torch import Tensor

from helexa import _C
from helexa.ops.tensor import DTYPE_IDS, check, dtype_id

PAGE_TOKENS = 256  # csrc/ops/attention.h


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    kv_lengths: Tensor,
    scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(q · kᵀ · scale) · v, where a query sees its own position and those before it.

    q: [T, H, D] float32.   k_cache, v_cache: [pages, Hkv, 256, D] float32 | float16 | bfloat16.
    page_table: [S, max_pages] int32.   query_start: [S+1] int32.   kv_lengths: [S] int32.
    Hkv divides H.   out: like q; may be q itself.
    Sequence s has kv_lengths[s] keys, in the pages of its row of page_table; its queries are the rows
    query_start[s] to query_start[s+1] of q and stand at the last of those positions.  A query without keys
    gives zeros.  Arithmetic is float32, except that q and the softmax weights of more than a few query rows
    are rounded to bfloat16 for bfloat16 caches where the machine multiplies those.  The result does not
    depend on the number of threads.
    Raises ValueError if a shape or dtype does not fit.  Capturable: allocates only `out`; the tables are read
    at each replay.
    """
    check(
        q.ndim == 3 and q.dtype == torch.float32 and q.is_contiguous(),
        f"attention: q {tuple(q.shape)} {q.dtype} is not a contiguous [T, H, D] float32",
    )
    num_heads, head_dim = q.shape[1:]
    check_cache("attention", k_cache, v_cache, head_dim)
    num_kv_heads = k_cache.shape[1]
    check(
        num_heads % num_kv_heads == 0,
        f"attention: {num_heads} query heads do not share {num_kv_heads} kv heads evenly",
    )
    num_sequences = kv_lengths.shape[0]
    for name, table, shape in (
        ("page_table", page_table, (num_sequences, page_table.shape[-1])),
        ("query_start", query_start, (num_sequences + 1,)),
        ("kv_lengths", kv_lengths, (num_sequences,)),
    ):
        check(
            table.shape == shape and table.dtype == torch.int32 and table.is_contiguous(),
            f"attention: {name} {tuple(table.shape)} {table.dtype} is not a contiguous {shape} int32",
        )
    out = torch.empty(q.shape, dtype=torch.float32) if out is None else out
    check(
        out.shape == q.shape and out.dtype == torch.float32 and out.is_contiguous(),
        f"attention: out {tuple(out.shape)} {out.dtype} is not like q {tuple(q.shape)}",
    )
    _C.attention_cpu(
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        dtype_id(k_cache),
        page_table.data_ptr(),
        query_start.data_ptr(),
        kv_lengths.data_ptr(),
        out.data_ptr(),
        num_sequences,
        page_table.shape[1],
        num_heads,
        num_kv_heads,
        head_dim,
        scale,
    )
    return out


def check_cache(op: str, k_cache: Tensor, v_cache: Tensor, head_dim: int) -> None:
    """Raises ValueError unless both caches are one layer's pages of heads of that size."""
    fits = k_cache.ndim == 4 and k_cache.shape[2:] == (PAGE_TOKENS, head_dim) and k_cache.dtype in DTYPE_IDS
    check(
        fits,
        f"{op}: k_cache {tuple(k_cache.shape)} {k_cache.dtype} is not [pages, Hkv, 256, {head_dim}]",
    )
    same = v_cache.shape == k_cache.shape and v_cache.dtype == k_cache.dtype
    check(
        same,
        f"{op}: v_cache {tuple(v_cache.shape)} {v_cache.dtype} is not like k_cache",
    )
    check(k_cache.is_contiguous() and v_cache.is_contiguous(), f"{op}: the caches are not contiguous")


def attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    kv_lengths: Tensor,
    scale: float,
) -> Tensor:
    """The same with the whole score matrix, in float64."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k_cache.shape[1]
    for s, length in enumerate(kv_lengths.tolist()):
        first, end = query_start[s].item(), query_start[s + 1].item()
        pages = page_table[s, : -(-length // PAGE_TOKENS)].long()
        k, v = (
            cache[pages].transpose(1, 2).flatten(0, 1)[:length].double().repeat_interleave(group, dim=1)
            for cache in (k_cache, v_cache)
        )  # [length, H, D]
        scores = torch.einsum("qhd,khd->hqk", q[first:end].double(), k) * scale
        position = torch.arange(length - (end - first), length)
        masked = scores.masked_fill(torch.arange(length) > position[:, None], -torch.inf)
        weights = masked.softmax(-1).nan_to_num(0.0) if length < end - first else masked.softmax(-1)
        out[first:end] = torch.einsum("hqk,khd->qhd", weights, v).float()
    return out
