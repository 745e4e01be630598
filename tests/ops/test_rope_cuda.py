import pytest
import torch

from helexa import ops
from support.kv_caches import cache_values, make_cache

pytestmark = pytest.mark.cuda

CACHE_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8]


def inverse_frequencies(num_rotated: int) -> torch.Tensor:
    return 1e4 ** -(torch.arange(0, num_rotated, 2) / num_rotated)


@pytest.mark.parametrize(("num_tokens", "num_pairs"), [(1, 64), (3, 1), (63, 40), (300, 64)])
def test_the_table_equals_the_reference(cuda_device, num_tokens, num_pairs):
    positions = torch.randint(0, 1_000_000, (num_tokens,), dtype=torch.int32)
    inv_freq = inverse_frequencies(2 * num_pairs)
    out = torch.full((num_tokens, num_pairs, 2), torch.nan, device=cuda_device)
    table = ops.rope_table(positions.to(cuda_device), inv_freq.to(cuda_device), 1.2, out=out)
    angles = (positions.float()[:, None] * inv_freq).double()
    exact = torch.stack([angles.cos(), angles.sin()], dim=-1) * 1.2
    assert table is out
    assert (table.cpu() - exact).abs().max() < 5e-7


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
    caches = {name: cache_values(call[name]) for name in ("k_cache", "v_cache")}
    if dtype != torch.int8:
        caches = {name: cache.to(dtype) for name, cache in caches.items()}
    expected = {**call, **caches}
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


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("qkv_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 70])
def test_it_equals_the_reference(cuda_device, num_tokens, qkv_dtype, dtype, norms, interleaved, assert_close):
    call = make_call(cuda_device, num_tokens, dtype=dtype, norms=norms, qkv_dtype=qkv_dtype)
    check_against_reference(call, interleaved, assert_close)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "num_rotated"),
    [
        (1, 1, 2, 2),
        (3, 1, 20, 20),
        (4, 4, 80, 80),
        (16, 8, 128, 128),
        (5, 1, 96, 32),
        (2, 1, 256, 64),
        (2, 2, 512, 512),
    ],
)
def test_head_shapes_and_partial_rotation(
    cuda_device, num_heads, num_kv_heads, head_dim, num_rotated, interleaved, assert_close
):
    call = make_call(cuda_device, 3, num_heads, num_kv_heads, head_dim, num_rotated)
    check_against_reference(call, interleaved, assert_close)


@pytest.mark.parametrize("qkv_dtype", [torch.float32, torch.bfloat16])
def test_rows_may_lie_apart(cuda_device, qkv_dtype, assert_close):
    call = make_call(cuda_device, qkv_dtype=qkv_dtype, more_columns=384)
    check_against_reference(call, False, assert_close)


def test_a_token_with_a_negative_slot_is_not_written(cuda_device, assert_close):
    call = make_call(cuda_device, 5)
    call["slots"][2] = -1
    check_against_reference(call, False, assert_close)
    assert cache_values(call["k_cache"]).any(-1).any(1).sum() == 4


def test_values_beyond_float8_become_the_greatest_and_nan_stays(cuda_device):
    call = make_call(cuda_device, 1, 1, 1, 16, dtype=torch.float8_e4m3fn, norms=False)
    call["qkv"][0, 32:35] = torch.tensor([1e6, -1e6, torch.nan])
    ops.rope_append(**call, interleaved=False)
    page, offset = divmod(int(call["slots"][0]), ops.PAGE_TOKENS)
    v = call["v_cache"][page, 0, offset].float()
    assert v[:2].tolist() == [448, -448]
    assert v[2].isnan()
    assert not v[3:].isnan().any()


def test_a_nan_spoils_its_head_in_int8(cuda_device):
    call = make_call(cuda_device, 1, 1, 2, 16, dtype=torch.int8, norms=False)
    call["qkv"][0, 48] = torch.nan
    ops.rope_append(**call, interleaved=False)
    page, offset = divmod(int(call["slots"][0]), ops.PAGE_TOKENS)
    v = cache_values(call["v_cache"])[page, :, offset]
    assert v[0].isnan().all()
    assert not v[1].isnan().any()


def test_the_two_pairings_differ(cuda_device, assert_close):
    call = make_call(cuda_device)
    neox = ops.rope_append(**call, interleaved=False)
    with pytest.raises(AssertionError, match="differs"):
        assert_close("pairing", neox, ops.rope_append(**call, interleaved=True), 1e-2)


def test_no_tokens_at_all_are_fine(cuda_device):
    assert ops.rope_append(**make_call(cuda_device, 0), interleaved=False).shape == (0, 6, 64)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qkv", torch.zeros(7, 10)),
        ("qkv", torch.zeros(7, 640).half()),
        ("table", torch.zeros(7, 40, 2)),
        ("slots", torch.zeros(7)),
        ("k_cache", torch.zeros(3, 2, 128, 64)),
        ("q_norm", torch.zeros(63)),
        ("out", torch.zeros(7, 6, 64)),
    ],
)
def test_what_does_not_fit_is_refused(cuda_device, name, value):
    with pytest.raises(ValueError, match="rope_append"):
        ops.rope_append(**{**make_call(cuda_device), name: value.to(cuda_device)}, interleaved=False)
