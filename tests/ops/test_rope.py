import pytest
import torch

from helexa import ops
from support.rope_calls import check_against_reference, inverse_frequencies, make_call

CACHE_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(("num_tokens", "num_pairs"), [(1, 64), (3, 1), (63, 40), (300, 64)])
def test_the_table_equals_the_reference(num_tokens, num_pairs, poisoned):
    positions = torch.randint(0, 40_960, (num_tokens,), dtype=torch.int32)
    inv_freq = inverse_frequencies(2 * num_pairs)
    table = ops.rope_table(positions, inv_freq, 1.2, out=poisoned(num_tokens, num_pairs, 2))
    # The angle is a float32 product as in the reference; of that angle sine and cosine are exact to float32.
    angles = (positions.float()[:, None] * inv_freq).double()
    exact = torch.stack([angles.cos(), angles.sin()], dim=-1) * 1.2
    assert (table - exact).abs().max() < 3e-7
    assert (table - ops.rope_table_reference(positions, inv_freq, 1.2)).abs().max() < 1e-6


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_it_equals_the_reference(isa, num_tokens, dtype, norms, interleaved, assert_close):
    check_against_reference(make_call("cpu", num_tokens, dtype=dtype, norms=norms), interleaved, assert_close)


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
    isa, num_heads, num_kv_heads, head_dim, num_rotated, interleaved, assert_close
):
    call = make_call("cpu", 3, num_heads, num_kv_heads, head_dim, num_rotated)
    check_against_reference(call, interleaved, assert_close)


def test_a_token_with_a_negative_slot_is_not_written(isa, assert_close):
    call = make_call("cpu", 5, dtype=torch.float32)
    call["slots"][2] = -1
    check_against_reference(call, False, assert_close)
    assert call["k_cache"].any(-1).any(1).sum() == 4


def test_values_beyond_float16_become_infinite_and_nan_stays(isa):
    call = make_call("cpu", 1, num_heads=1, num_kv_heads=1, head_dim=16, dtype=torch.float16, norms=False)
    call["qkv"][0, 32:35] = torch.tensor([1e6, -1e6, torch.nan])
    ops.rope_append(**call, interleaved=False)
    page, offset = divmod(int(call["slots"][0]), ops.PAGE_TOKENS)
    v = call["v_cache"][page, 0, offset]
    assert v[0] == torch.inf
    assert v[1] == -torch.inf
    assert v[2].isnan()
    assert not v[3:].isnan().any()


def test_the_two_pairings_differ(assert_close):
    call = make_call("cpu", dtype=torch.float32)
    neox = ops.rope_append(**call, interleaved=False)
    with pytest.raises(AssertionError, match="differs"):
        assert_close("pairing", neox, ops.rope_append(**call, interleaved=True), 1e-2)


def test_a_replay_reads_new_positions_and_slots(isa):
    call = make_call("cpu", 4, dtype=torch.bfloat16)
    positions, inv_freq = torch.zeros(4, dtype=torch.int32), inverse_frequencies(64)
    graph = ops.CpuGraph()
    with graph.capture():
        call["table"] = ops.rope_table(positions, inv_freq)
        q = ops.rope_append(**call, interleaved=False)
    positions.copy_(torch.tensor([900, 901, 902, 3]))
    call["slots"].copy_(torch.tensor([5, 300, 17, -1]))
    graph.replay()
    eager_caches = {
        "k_cache": torch.zeros_like(call["k_cache"]),
        "v_cache": torch.zeros_like(call["v_cache"]),
    }
    eager = {**call, **eager_caches, "table": ops.rope_table(positions, inv_freq)}
    assert torch.equal(q, ops.rope_append(**eager, interleaved=False))
    assert torch.equal(call["k_cache"], eager["k_cache"])
    assert torch.equal(call["v_cache"], eager["v_cache"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qkv", torch.zeros(7, 10)),
        ("table", torch.zeros(7, 40, 2)),
        ("slots", torch.zeros(7)),
        ("slots", torch.zeros(6, dtype=torch.int32)),
        ("k_cache", torch.zeros(3, 2, 128, 64)),
        ("v_cache", torch.zeros(3, 2, 256, 64).half()),
        ("q_norm", torch.zeros(63)),
        ("k_norm", torch.zeros(64).half()),
        ("out", torch.zeros(7, 5, 64)),
    ],
)
def test_what_does_not_fit_is_refused(name, value):
    with pytest.raises(ValueError, match="rope_append"):
        ops.rope_append(**{**make_call("cpu", dtype=torch.float32), name: value}, interleaved=False)


def test_a_table_refuses_positions_that_are_not_int32():
    with pytest.raises(ValueError, match="rope_table: positions"):
        ops.rope_table(torch.zeros(3, dtype=torch.int64), torch.ones(4))
