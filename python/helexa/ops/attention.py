"""Causal attention over a paged cache, for prefill and decode (Dao et al. 2022; pages: Kwon et al. 2023)."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from helexa import _C
from helexa.ops.activation import MAX_MATVEC_ROWS, Activation, Rows, empty_activation
from helexa.ops.sigmoid_mul import sigmoid_mul
from helexa.ops.tensor import (
    DTYPE_IDS,
    EMULATED,
    address,
    check,
    check_device,
    check_tensor,
    dtype_id,
    on_cuda,
    stream,
)

PAGE_TOKENS = 256  # csrc/ops/attention.h
# On CUDA, in steps of more than MAX_MATVEC_ROWS tokens: who has at most so many queries splits its keys.
SPLIT_QUERIES = 16
MAX_SPLIT_BYTES = 32 << 20  # of partial results on CUDA; steps of many sequences get fewer splits each
_MIN_SPLIT_KEYS = 64  # csrc/ops/attention_decode.cuh
_MAX_SPLITS = 24  # csrc/ops/attention_split.cuh
CACHE_DTYPE_IDS = {**DTYPE_IDS, torch.float8_e4m3fn: 3, torch.int8: 4}  # csrc/ops/attention.h


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    kv_lengths: Tensor,
    scale: float,
    *,
    gate: Tensor | None = None,
    rows: slice = slice(None),
    out: Rows | None = None,
) -> Rows:
    """softmax(q · kᵀ · scale) · v of the given rows, [R, H · D]; a query sees its own and earlier positions.

    q: [T, H, D] float32; on CUDA any float dtype, best query_dtype(k_cache).
    k_cache, v_cache: [pages, Hkv, 256, D] float32 | float16 | bfloat16; on CUDA also float8_e4m3fn and
    int8, the latter with rows of scales (`cache_shape`).
    page_table: [S, max_pages] int32.   query_start: [S+1] int32.   kv_lengths: [S] int32.
    gate: [R, H · D] float32, on CUDA also bfloat16 and in rows that lie apart; its sigmoid
    multiplies the result.
    Hkv divides H.   out: on the CPU [T, H · D] float32, may be q's memory; on CUDA like the result.
    Sequence s has kv_lengths[s] keys, in the pages of its row of page_table; its queries are the rows
    query_start[s] to query_start[s+1] of q and stand at the last of those positions.  A query without keys
    gives zeros.

    On the CPU arithmetic is float32, except that q and the softmax weights of more than a few query rows
    are rounded to bfloat16 for bfloat16 caches where the machine multiplies those.  The result does not
    depend on the number of threads.
    On CUDA heads of 64, 128 and 256 whose caches are not float32 run on tensor cores, with q and the weights
    rounded to the caches' dtype (float16 for those of bytes), and give an Activation; other shapes are
    computed slowly in float32 and give a Tensor.
    Splits depend on a sequence's length only, unless MAX_SPLIT_BYTES limits them.
    Raises ValueError if a shape, dtype or device does not fit.  Capturable: allocates `out` and workspaces;
    the tables are read at each replay.
    """
    fits = (
        q.ndim == 3
        and q.is_contiguous()
        and (q.dtype == torch.float32 or (on_cuda(q) and q.dtype in DTYPE_IDS))
    )
    check(fits, lambda: f"attention: q {tuple(q.shape)} {q.dtype} is not a contiguous [T, H, D] float32")
    num_heads, head_dim = q.shape[1:]
    check_cache("attention", k_cache, v_cache, head_dim)
    tables = (page_table, query_start, kv_lengths)
    check_attention("attention", q, num_heads, k_cache, tables)
    first_row, end_row, step = rows.indices(q.shape[0])
    check(step == 1, lambda: f"attention: {rows} leaves rows out")
    check_gate("attention", gate, (max(0, end_row - first_row), num_heads * head_dim), q)
    num_kv_heads, num_sequences = k_cache.shape[1], kv_lengths.shape[0]
    if on_cuda(q):
        return attention_on_cuda(
            q.to(query_dtype(k_cache)),
            k_cache,
            v_cache,
            tables,
            scale,
            gate,
            slice(first_row, max(first_row, end_row)),
            out,
        )
    out = torch.empty((q.shape[0], num_heads * head_dim), dtype=torch.float32) if out is None else out
    fits = isinstance(out, Tensor) and out.shape == (q.shape[0], num_heads * head_dim)
    check(
        fits and out.dtype == torch.float32 and out.is_contiguous(),  # type: ignore[union-attr]
        f"attention: out is not a contiguous {(q.shape[0], num_heads * head_dim)} float32",
    )
    _C.attention_cpu(
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        dtype_id(k_cache),
        page_table.data_ptr(),
        query_start.data_ptr(),
        kv_lengths.data_ptr(),
        out.data_ptr(),  # type: ignore[union-attr]
        num_sequences,
        page_table.shape[1],
        num_heads,
        num_kv_heads,
        head_dim,
        scale,
    )
    wanted = out[first_row:end_row]
    return wanted if gate is None else sigmoid_mul(wanted, gate)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Unappended:
    """What attention on CUDA takes the queries from where keys and values have yet to be appended."""

    table: Tensor
    slots: Tensor
    num_heads: int
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    interleaved: bool

    def arguments(self, qkv: Tensor) -> tuple[int, int, int, int, int, int, float, int, bool]:
        """Those of _C.attention_cuda."""
        return (
            qkv.data_ptr(),
            qkv.stride(0),
            self.slots.data_ptr(),
            self.table.data_ptr(),
            address(self.q_norm),
            address(self.k_norm),
            self.eps,
            self.table.shape[1],
            self.interleaved,
        )


def attention_on_cuda(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: tuple[Tensor, Tensor, Tensor],
    scale: float,
    gate: Tensor | None,
    rows: slice,
    out: Rows | None,
    unappended: Unappended | None = None,
) -> Rows:
    """`attention` of arguments that were checked; q is qkv where it is unappended."""
    num_tokens, head_dim = q.shape[0], k_cache.shape[3]
    num_heads = q.shape[1] if unappended is None else unappended.num_heads
    num_kv_heads, width = k_cache.shape[1], num_heads * head_dim
    num_rows = rows.stop - rows.start
    page_table, query_start, kv_lengths = tables
    num_sequences, max_pages = page_table.shape
    cache_dtype = CACHE_DTYPE_IDS[k_cache.dtype]
    is_tiled = _C.is_attention_tiled(head_dim, cache_dtype)
    if out is None:
        if is_tiled:
            out = empty_activation(num_rows, width, q.device)
        else:
            out = torch.empty((num_rows, width), dtype=torch.float32, device=q.device)
    check(
        _is_output(out, num_rows, width, is_tiled),
        lambda: f"attention: out is not {'an Activation' if is_tiled else 'float32'} of {(num_rows, width)}",
    )
    counters = partial = None
    split_queries = max_splits = 0
    if is_tiled:
        split_queries = 0 if num_tokens <= MAX_MATVEC_ROWS else SPLIT_QUERIES
        num_queries = split_queries * num_sequences or num_tokens
        split_bytes = num_queries * num_heads * (2 * head_dim + 8)
        # A block for each multiprocessor, if that leaves them _MIN_SPLIT_KEYS keys.
        max_splits = min(
            num_multiprocessors(q.device) // num_kv_heads,
            max_pages * PAGE_TOKENS // _MIN_SPLIT_KEYS,
            MAX_SPLIT_BYTES // max(split_bytes, 1),
            _MAX_SPLITS,
        )
        max_splits = max(max_splits, 1)
        partial = torch.empty(split_bytes * max_splits, dtype=torch.uint8, device=q.device)
        counters = _counters(q.device, num_queries * num_heads)
    q8, bf16, x = (out.q8, out.bf16, None) if isinstance(out, Activation) else (None, None, out)
    _C.attention_cuda(
        q.data_ptr() if unappended is None else 0,
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        cache_dtype,
        page_table.data_ptr(),
        query_start.data_ptr(),
        kv_lengths.data_ptr(),
        num_tokens,
        num_sequences,
        max_pages,
        num_heads,
        num_kv_heads,
        head_dim,
        scale,
        rows.start,
        rows.stop,
        address(gate),
        0 if gate is None else dtype_id(gate),
        0 if gate is None else gate.stride(0),
        address(q8),
        address(bf16),
        address(x),
        split_queries,
        address(counters),
        address(partial),
        max_splits,
        *((0, 0, 0, 0, 0, 0, 0.0, 0, False) if unappended is None else unappended.arguments(q)),
        stream(q),
    )
    return out


def _is_output(out: Rows, num_rows: int, width: int, is_tiled: bool) -> bool:
    if isinstance(out, Activation):
        return is_tiled and out.num_rows == num_rows and out.cols == width
    return (
        not is_tiled and out.shape == (num_rows, width) and out.dtype == torch.float32 and out.is_contiguous()
    )


def check_attention(
    op: str, q: Tensor, num_heads: int, k_cache: Tensor, tables: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Raises ValueError unless the heads and tables are such as `attention` takes, on q's device."""
    num_kv_heads = k_cache.shape[1]
    check(
        num_heads % num_kv_heads == 0,
        lambda: f"{op}: {num_heads} query heads do not share {num_kv_heads} kv heads evenly",
    )
    page_table, query_start, kv_lengths = tables
    num_sequences = kv_lengths.shape[0]
    for name, table, shape in (
        ("page_table", page_table, (num_sequences, page_table.shape[-1])),
        ("query_start", query_start, (num_sequences + 1,)),
        ("kv_lengths", kv_lengths, (num_sequences,)),
    ):
        check_tensor(op, name, table, shape, torch.int32)
        check_device(op, name, table, q)
    check_device(op, "k_cache", k_cache, q)


def check_gate(op: str, gate: Tensor | None, shape: tuple[int, int], q: Tensor) -> None:
    """Raises ValueError unless it is an output gate of that shape, on q's device."""
    if gate is None:
        return
    fits = gate.shape == shape and gate.device == q.device
    if on_cuda(q):
        # Kernels read four values at once.
        is_aligned = gate.stride(0) % 4 == 0 and gate.data_ptr() % (4 * gate.element_size()) == 0
        fits = fits and gate.dtype in (torch.float32, torch.bfloat16)
        fits = fits and (shape[0] == 0 or (gate.stride(1) == 1 and is_aligned))
    else:
        fits = fits and gate.dtype == torch.float32 and gate.is_contiguous()
    check(
        fits,
        lambda: f"{op}: gate {tuple(gate.shape)} {gate.dtype} is not {shape} float32 rows on {q.device}",
    )


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; some where the host stands for one."""
    return 4 if EMULATED else torch.cuda.get_device_properties(device).multi_processor_count


# Counters of finished splits, which kernels leave at 0.  A thread uses one stream at a time.
_thread = threading.local()
_NUM_COUNTERS = 1 << 18


def _counters(device: torch.device, count: int) -> Tensor:
    check(count <= _NUM_COUNTERS, lambda: f"attention: {count} rows, expected at most {_NUM_COUNTERS}")
    by_device: dict[torch.device, Tensor] = vars(_thread).setdefault("counters", {})
    if device not in by_device:
        by_device[device] = torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=device)
    return by_device[device]


def query_dtype(k_cache: Tensor) -> torch.dtype:
    """In which attention on CUDA multiplies queries with such a cache."""
    return torch.float16 if k_cache.dtype.itemsize == 1 else k_cache.dtype


def cache_shape(shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of a cache of that dtype that holds [pages, Hkv, 256, D] values.

    Of int8 codes it has more rows behind the 256: the float32 scales of the page's tokens, one for each.
    """
    *pages, num_tokens, head_dim = shape
    more = -(-4 * num_tokens // head_dim) if dtype == torch.int8 else 0
    return (*pages, num_tokens + more, head_dim)


def check_cache(op: str, k_cache: Tensor, v_cache: Tensor, head_dim: int) -> None:
    """Raises ValueError unless both caches are one layer's pages of heads of that size."""
    shape, dtype = k_cache.shape, k_cache.dtype
    fits = len(shape) == 4 and dtype in (CACHE_DTYPE_IDS if on_cuda(k_cache) else DTYPE_IDS)
    fits = fits and head_dim > 0 and shape[2:] == cache_shape((PAGE_TOKENS, head_dim), dtype)
    fits = fits and (dtype != torch.int8 or head_dim % 4 == 0)
    check(fits, lambda: f"{op}: k_cache {tuple(shape)} {dtype} is not [pages, Hkv, 256, {head_dim}]")
    check(
        v_cache.shape == shape and v_cache.dtype == dtype,
        lambda: f"{op}: v_cache {tuple(v_cache.shape)} {v_cache.dtype} is not like k_cache",
    )
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError(f"{op}: the caches are not contiguous")


def attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    kv_lengths: Tensor,
    scale: float,
    *,
    gate: Tensor | None = None,
    rows: slice = slice(None),
) -> Tensor:
    """The same with the whole score matrix, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    group = q.shape[1] // k_cache.shape[1]
    for s, length in enumerate(kv_lengths.tolist()):
        first, end = query_start[s].item(), query_start[s + 1].item()
        pages = page_table[s, : -(-length // PAGE_TOKENS)].long()
        k, v = (
            cache[pages].transpose(1, 2).flatten(0, 1)[:length].double().repeat_interleave(group, dim=1)
            for cache in (k_cache, v_cache)
        )  # [length, H, D]
        scores = torch.einsum("qhd,khd->hqk", q[first:end].double(), k) * scale
        position = torch.arange(length - (end - first), length, device=q.device)
        masked = scores.masked_fill(torch.arange(length, device=q.device) > position[:, None], -torch.inf)
        weights = masked.softmax(-1).nan_to_num(0.0) if length < end - first else masked.softmax(-1)
        out[first:end] = torch.einsum("hqk,khd->qhd", weights, v)
    wanted = out.flatten(1)[rows]
    return (wanted if gate is None else wanted * gate.double().sigmoid()).float()
