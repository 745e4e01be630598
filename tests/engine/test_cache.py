import pytest
import torch

from helexa.engine.cache import KVCache, kv_dtype, page_nbytes, plan_capacity
from helexa.errors import InvalidParameter, OutOfMemory

SHAPES = [(9, 2, 4, 3), (9, 1, 4, 5)]


def plan(**changes):
    sizes = {
        "page_bytes": 1000,
        "page_tokens": 256,
        "model_context": 40960,
        "max_context": None,
        "max_sequences": 4,
        "kv_cache_tokens": None,
        "free_bytes": 10**9,
    }
    return plan_capacity(**sizes | changes)


def test_a_copy_takes_the_asked_positions_of_all_layers_and_leaves_the_rest():
    cache = KVCache(SHAPES, torch.float32)
    for tensor in (*cache.k, *cache.v):
        tensor.copy_(torch.randn(tensor.shape))
    before = [tensor.clone() for tensor in (*cache.k, *cache.v)]
    cache.copy(3, 7, 2)
    for tensor, old in zip((*cache.k, *cache.v), before, strict=True):
        old[7, :, :2] = old[3, :, :2]
        assert torch.equal(tensor, old)


def test_a_copy_of_int8_codes_takes_their_scales_along():
    cache = KVCache(SHAPES, torch.int8)
    for tensor in (*cache.k, *cache.v):
        tensor.copy_(torch.randint(-127, 128, tensor.shape))
    before = [tensor.clone() for tensor in (*cache.k, *cache.v)]
    cache.copy(3, 7, 2)
    for tensor, old in zip((*cache.k, *cache.v), before, strict=True):
        assert tensor.shape[2] * tensor.shape[3] >= 4 * (tensor.shape[3] + 4)
        old[7, :, :2], old[7, :, 4:] = old[3, :, :2], old[3, :, 4:]
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_page_is_as_large_as_what_a_cache_of_pages_takes(dtype):
    cache = KVCache(SHAPES, dtype)
    assert 9 * page_nbytes(SHAPES, dtype) == sum(t.nbytes for t in (*cache.k, *cache.v))


def test_dtypes_are_known_by_name():
    assert kv_dtype("float16", on_cuda=False) == torch.float16
    assert kv_dtype("float8_e4m3", on_cuda=True) == torch.float8_e4m3fn
    with pytest.raises(
        InvalidParameter, match="kv_dtype is 'q8'; expected one of float32, float16, bfloat16"
    ):
        kv_dtype("q8", on_cuda=True)
    with pytest.raises(InvalidParameter, match="which only CUDA devices have"):
        kv_dtype("float8_e4m3", on_cuda=False)


@pytest.mark.parametrize(
    ("changes", "pages", "context"),
    [
        ({}, 160, 40960),  # one full context is more than 4 x 8192
        ({"model_context": 8192}, 128, 8192),  # each sequence has a full context
        ({"max_context": 1000}, 16, 1000),  # rounded up to pages for each
        ({"max_context": 100000}, 160, 40960),  # the model's own limit holds
        ({"free_bytes": 100_000}, 50, 12800),  # half of what is free; nobody asked for more
        ({"free_bytes": 100_000, "max_context": 20000}, 79, 20000),  # asked for: beyond half, but it fits
        ({"kv_cache_tokens": 5000}, 20, 5120),  # no sequence can be longer than the cache
        ({"kv_cache_tokens": 100_000}, 391, 40960),
    ],
)
def test_sizes_follow_what_is_asked_and_what_is_free(changes, pages, context):
    assert plan(**changes) == (pages, context)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kv_cache_tokens": 256_000, "free_bytes": 10**6},
            "256000 tokens needs 1001000 bytes, but only 950000",
        ),
        ({"max_context": 40960, "free_bytes": 100_000}, "40960 tokens needs 161000 bytes, but only 95000"),
        ({"free_bytes": 100}, "256 tokens needs 2000 bytes, but only 95"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_bytes(changes, message):
    with pytest.raises(OutOfMemory, match=message):
        plan(**changes)
