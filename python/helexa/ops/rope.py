"""Rotary position embedding (Su et al. 2021), with the norms per head of Qwen3 and cache append."""

import torch
from torch import Tensor

from helexa import _C
from helexa.ops.attention import CACHE_DTYPE_IDS, PAGE_TOKENS, check_cache, query_dtype
from helexa.ops.rms_norm import rms_norm_reference
from helexa.ops.tensor import address, check, check_device, check_tensor, dtype_id, on_cuda, stream

_MAX_HEAD_DIM = 512  # csrc/ops/rope.h


def rope_table(
    positions: Tensor, inv_freq: Tensor, magnitude: float = 1.0, *, out: Tensor | None = None
) -> Tensor:
    """(cos, sin) of positions[t] · inv_freq[i] (a float32 product), times magnitude: [T, R/2, 2] float32.

    positions: [T] int32.   inv_freq: [R/2] float32.
    Raises ValueError if a shape, dtype or device does not fit.  Capturable: allocates only `out`.
    """
    check_tensor("rope_table", "positions", positions, (positions.numel(),), torch.int32)
    check_tensor("rope_table", "inv_freq", inv_freq, (inv_freq.numel(),), torch.float32)
    check_device("rope_table", "inv_freq", inv_freq, positions)
    shape = (positions.shape[0], inv_freq.shape[0], 2)
    out = torch.empty(shape, dtype=torch.float32, device=positions.device) if out is None else out
    check_tensor("rope_table", "out", out, shape, torch.float32)
    arguments = (positions.data_ptr(), inv_freq.data_ptr(), out.data_ptr(), *shape[:2], magnitude)
    if on_cuda(positions):
        _C.rope_table_cuda(*arguments, stream(positions))
    else:
        _C.rope_table_cpu(*arguments)
    return out


def rope_table_reference(positions: Tensor, inv_freq: Tensor, magnitude: float = 1.0) -> Tensor:
    """The same in torch."""
    angles = positions.float()[:, None] * inv_freq
    return torch.stack([angles.cos(), angles.sin()], dim=-1) * magnitude


def rope_append(
    qkv: Tensor,
    table: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    num_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    interleaved: bool,
    out: Tensor | None = None,
) -> Tensor:
    """The queries of qkv, normed and rotated: [T, H, D]; keys and values go to the cache.

    qkv: [T, (H + 2 Hkv) · D] float32; on CUDA also bfloat16, and its rows may lie apart.
    table: [T, R/2, 2] of `rope_table`, R ≤ D: the first R values of a head are rotated, in pairs
    (i, i + R/2), or (2i, 2i + 1) if interleaved.
    slots: [T] int32, page · 256 + offset; a negative one is not written.
    k_cache, v_cache: [pages, Hkv, 256, D] float32 | float16 | bfloat16; on CUDA also float8_e4m3fn and
    int8, the latter with rows of scales (`cache_shape`).
    q_norm, k_norm: [D] float32 weights of a norm per head.
    out: float32; on CUDA of the dtype that attention multiplies.
    Raises ValueError if a shape, dtype or device does not fit.  Capturable: allocates only `out`.
    """
    check_append("rope_append", qkv, table, slots, k_cache, v_cache, num_heads, q_norm, k_norm)
    num_tokens, num_pairs = table.shape[:2]
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    is_cuda = on_cuda(qkv)
    out_shape, out_dtype = (
        (num_tokens, num_heads, head_dim),
        query_dtype(k_cache) if is_cuda else torch.float32,
    )
    if out is None:
        out = torch.empty(out_shape, dtype=out_dtype, device=qkv.device)
    check_tensor("rope_append", "out", out, out_shape, out_dtype)
    check_device("rope_append", "out", out, qkv)
    common = (
        table.data_ptr(),
        slots.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        CACHE_DTYPE_IDS[k_cache.dtype],
        out.data_ptr(),
        address(q_norm),
        address(k_norm),
        eps,
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        num_pairs,
        interleaved,
    )
    if is_cuda:
        _C.rope_append_cuda(qkv.data_ptr(), dtype_id(qkv), qkv.stride(0), *common, stream(qkv))
    else:
        _C.rope_append_cpu(qkv.data_ptr(), *common)
    return out


def check_append(
    op: str,
    qkv: Tensor,
    table: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> None:
    """Raises ValueError unless these fit each other as `rope_append` says."""
    num_tokens, num_pairs = table.shape[:2]
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    is_cuda = on_cuda(qkv)
    check_cache(op, k_cache, v_cache, head_dim)
    check(head_dim <= _MAX_HEAD_DIM, lambda: f"{op}: head_dim {head_dim} is above {_MAX_HEAD_DIM}")
    check(
        2 * num_pairs <= head_dim,
        lambda: f"{op}: the table rotates {2 * num_pairs} values of heads of {head_dim}",
    )
    width = (num_heads + 2 * num_kv_heads) * head_dim
    in_dtypes = (torch.float32, torch.bfloat16) if is_cuda else (torch.float32,)
    has_rows = qkv.is_contiguous() or (is_cuda and qkv.stride(-1) == 1)
    check(
        qkv.shape == (num_tokens, width) and qkv.dtype in in_dtypes and has_rows,
        lambda: f"{op}: qkv {tuple(qkv.shape)} {qkv.dtype} is not rows {(num_tokens, width)} float32",
    )
    for name, tensor, shape, dtype in (
        ("table", table, (num_tokens, num_pairs, 2), torch.float32),
        ("slots", slots, (num_tokens,), torch.int32),
        ("q_norm", q_norm, (head_dim,), torch.float32),
        ("k_norm", k_norm, (head_dim,), torch.float32),
    ):
        if tensor is not None:
            check_tensor(op, name, tensor, shape, dtype)
            check_device(op, name, tensor, qkv)
    check_device(op, "k_cache", k_cache, qkv)


def rope_append_reference(
    qkv: Tensor,
    table: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    num_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    interleaved: bool,
) -> Tensor:
    """The same in torch, in float32."""
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    q, k, v = qkv.float().view(len(qkv), -1, head_dim).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    q = q.clone() if q_norm is None else rms_norm_reference(q, q_norm, eps)
    k = k.clone() if k_norm is None else rms_norm_reference(k, k_norm, eps)
    _rotate(q, table, interleaved)
    _rotate(k, table, interleaved)
    written = slots >= 0
    page, offset = slots[written].long() // PAGE_TOKENS, slots[written].long() % PAGE_TOKENS
    k_cache[page, :, offset] = k[written].to(k_cache.dtype)
    v_cache[page, :, offset] = v[written].to(v_cache.dtype)
    return q


def _rotate(x: Tensor, table: Tensor, interleaved: bool) -> None:
    num_rotated = 2 * table.shape[1]
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]  # [T, 1, R/2]
    if interleaved:
        a, b = x[..., 0:num_rotated:2].clone(), x[..., 1:num_rotated:2].clone()
        x[..., 0:num_rotated:2], x[..., 1:num_rotated:2] = a * cos - b * sin, b * cos + a * sin
    else:
        a, b = x[..., :num_rotated].clone().chunk(2, dim=-1)
        x[..., :num_rotated] = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
