"""Caches of every dtype, made from values and read back."""

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
