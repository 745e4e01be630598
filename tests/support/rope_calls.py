"""Calls of rope_append with random numbers, on the CPU or a device, and what its reference makes of them."""

import torch

from helexa import ops
from helexa.ops.tensor import on_cuda
from support.kv_caches import cache_values, make_cache


def inverse_frequencies(num_rotated: int) -> torch.Tensor:
    return 1e4 ** -(torch.arange(0, num_rotated, 2) / num_rotated)


def make_call(
    device,
    num_tokens=7,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    num_rotated=None,
    dtype=torch.bfloat16,
    norms=True,
    qkv_dtype=torch.float32,
    more_columns=0,
):
    num_rotated = head_dim if num_rotated is None else num_rotated
    positions = torch.randint(0, 5000, (num_tokens,), dtype=torch.int32)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    cache = make_cache(torch.zeros(3, num_kv_heads, ops.PAGE_TOKENS, head_dim), dtype)
    tensors = {
        "qkv": torch.randn(num_tokens, width + more_columns).to(qkv_dtype)[:, :width],
        "table": ops.rope_table_reference(positions, inverse_frequencies(num_rotated)),
        "slots": torch.randperm(3 * ops.PAGE_TOKENS, dtype=torch.int32)[:num_tokens],
        "k_cache": cache,
        "v_cache": cache.clone(),
    }
    if norms:
        tensors |= {"q_norm": torch.randn(head_dim), "k_norm": torch.randn(head_dim)}
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    return {**moved, "num_heads": num_heads, "eps": 1e-6}


def check_against_reference(call, interleaved, assert_close):
    dtype = call["k_cache"].dtype
    # The reference's caches are those of torch, and int8's are float32, from which codes are made.
    caches = {name: cache_values(call[name]).clone() for name in ("k_cache", "v_cache")}
    if dtype != torch.int8:
        caches = {name: cache.to(dtype) for name, cache in caches.items()}
    expected = {**call, **caches}
    q_dtype = torch.float32  # what the CPU has between ops
    if on_cuda(call["qkv"]):
        q_dtype = torch.float16 if dtype.itemsize == 1 else dtype
    q_expected = ops.rope_append_reference(**expected, interleaved=interleaved).to(q_dtype)
    out = torch.full_like(q_expected, torch.nan)
    q = ops.rope_append(**call, interleaved=interleaved, out=out)
    assert q is out
    # A last-bit difference in float32 may round to either neighbour in the type of the cache.
    tolerances = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3, torch.float8_e4m3fn: 1e-2}
    tolerances[torch.int8] = 1e-3
    assert_close("q", q_expected, q, tolerances[q_dtype])
    caches = {name: make_cache(cache.float().cpu(), dtype) for name, cache in caches.items()}
    assert_close("k", cache_values(caches["k_cache"]), cache_values(call["k_cache"]).cpu(), tolerances[dtype])
    assert torch.equal(caches["v_cache"].view(torch.uint8), call["v_cache"].view(torch.uint8).cpu())
