import pytest
import torch

from helexa import ops
from support.kv_caches import cache_values
from support.rope_calls import check_against_reference, inverse_frequencies, make_call

pytestmark = pytest.mark.cuda

CACHE_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8]


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
