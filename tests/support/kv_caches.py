"""Caches of every dtype, made from values and read back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from helexa import ops


def make_cache(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A cache that holds [pages, Hkv, 256, D] values; where these are NaN, it is as bad."""
    if dtype != torch.int8:
        return values.to(dtype)
    most = values.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(most, 127.0) / most.clamp(min=1e-30)
    codes = torch.where(most.isnan(), 77.0, values * inverse).round().to(torch.int8)
    more = ops.cache_shape(values.shape, dtype)[2] - ops.PAGE_TOKENS
    tail = torch.full((*values.shape[:2], more * values.shape[3]), 0x7F, dtype=torch.int8)
    tail[..., : 4 * ops.PAGE_TOKENS] = (most / 127).flatten(2).view(torch.int8)
    return torch.cat([codes, tail.unflatten(-1, (more, -1))], dim=2)


def cache_values(cache: Tensor) -> Tensor:
    """float32 [pages, Hkv, 256, D] that a cache holds."""
    if cache.dtype != torch.int8:
        return cache.float()
    codes, tail = cache[:, :, : ops.PAGE_TOKENS], cache[:, :, ops.PAGE_TOKENS :]
    scales = tail.flatten(2)[..., : 4 * ops.PAGE_TOKENS].contiguous().view(torch.float32)
    return codes.float() * scales[..., None]


def random_pages(
    kv_lengths: Sequence[int], num_kv_heads: int, head_dim: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values [pages, Hkv, 256, D] in shuffled pages, NaN where there is no key, and the page table."""
    pages_each = [-(-length // ops.PAGE_TOKENS) for length in kv_lengths]
    num_pages = sum(pages_each) + 2
    order = torch.randperm(num_pages, generator=generator).tolist()
    shape = (num_pages, num_kv_heads, ops.PAGE_TOKENS, head_dim)
    caches = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    page_table = torch.full((len(kv_lengths), max(pages_each, default=0) + 1), 2**31 - 1, dtype=torch.int32)
    for s, length in enumerate(kv_lengths):
        for p in range(pages_each[s]):
            page_table[s, p] = page = order.pop()
            filled = min(ops.PAGE_TOKENS, length - p * ops.PAGE_TOKENS)
            for pages in caches:
                pages[page, :, :filled] = torch.randn(num_kv_heads, filled, head_dim, generator=generator)
    return *caches, page_table
