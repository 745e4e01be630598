from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor

from helexa import _C, ops
from support.kv_caches import random_pages

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Call:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor
    query_start: Tensor
    kv_lengths: Tensor
    scale: float

    def run(self) -> Tensor:
        return ops.attention(**vars(self), out=torch.full_like(self.q.flatten(1), torch.nan))

    def reference(self) -> Tensor:
        return ops.attention_reference(**vars(self))


def make_call(
    query_lengths,
    kv_lengths,
    *,
    group=2,
    num_kv_heads=2,
    head_dim=64,
    dtype=torch.float32,
    amplitude=1.0,
    seed=0,
) -> Call:
    """Random queries, keys and values in shuffled pages; what belongs to no key is NaN."""
    generator = torch.Generator().manual_seed(seed)
    k_cache, v_cache, page_table = random_pages(kv_lengths, num_kv_heads, head_dim, generator)
    query_start = torch.tensor([0, *query_lengths]).cumsum(0).int()
    q = torch.randn(int(query_start[-1]), num_kv_heads * group, head_dim, generator=generator) * amplitude
    caches = k_cache.to(dtype), v_cache.to(dtype)
    return Call(q, *caches, page_table, query_start, torch.tensor(kv_lengths).int(), head_dim**-0.5)


@cache
def reference(query_lengths: tuple[int, ...], kv_lengths: tuple[int, ...], **options) -> Tensor:
    """What make_call(...) has to give; the same for every instruction set, so computed once."""
    return make_call(query_lengths, kv_lengths, **options).reference()


def rounds_to_bfloat16(isa: str, call: Call) -> bool:
    """Whether a sequence of the call multiplies in bfloat16: not where a few rows wait for memory anyway."""
    group = call.q.shape[1] // call.k_cache.shape[1]
    most_rows = int(call.query_start.diff().max()) * group
    fits = call.k_cache.dtype == torch.bfloat16 and call.q.shape[-1] % 16 == 0
    return isa == "avx512vnni" and fits and most_rows > 8


def check(isa, assert_close, query_lengths, kv_lengths, **shape) -> None:
    call = make_call(query_lengths, kv_lengths, **shape)
    tolerance = 6e-3 if rounds_to_bfloat16(isa, call) else 2e-6
    assert_close("attention", reference(query_lengths, kv_lengths, **shape), call.run(), tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_ragged_sequences_equal_the_reference(isa, head_dim, group, dtype, assert_close):
    shape = {"group": group, "head_dim": head_dim, "dtype": dtype}
    check(isa, assert_close, (5, 1, 33, 2), (5, 300, 513, 700), **shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 20, 40, 63, 80, 96, 112, 256])
def test_any_head_size_works(isa, head_dim, dtype, assert_close):
    shape = {"group": 3, "num_kv_heads": 1, "head_dim": head_dim, "dtype": dtype}
    check(isa, assert_close, (3, 1, 40), (3, 257, 290), **shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 2, 4, 8, 9, 16, 17, 31, 63, 64, 65, 127, 128, 129, 200, 300])
def test_every_number_of_queries_works(isa, num_queries, dtype, assert_close):
    check(isa, assert_close, (num_queries,), (num_queries + 261,), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "length", [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2049]
)
@pytest.mark.parametrize("num_queries", [1, 7])
def test_every_border_of_tiles_pages_and_splits_is_right(isa, num_queries, length, dtype, assert_close):
    check(isa, assert_close, (min(num_queries, length),), (length,), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_context_is_joined_from_its_splits(isa, dtype, assert_close):
    check(isa, assert_close, (1, 4, 1), (5000, 3075, 1), group=4, dtype=dtype)


@pytest.mark.parametrize("num_queries", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8])
def test_few_queries_share_the_keys_of_their_group(isa, group, num_queries, assert_close):
    check(isa, assert_close, (num_queries, 1), (1300, 77), group=group, dtype=torch.bfloat16)


def test_more_heads_in_a_group_than_rows_in_a_block(isa, assert_close):
    check(isa, assert_close, (3,), (300,), group=150, num_kv_heads=1, head_dim=16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 70])
def test_scores_of_ten_thousand_stay_finite(isa, num_queries, dtype, assert_close):
    call = make_call([num_queries], [600], dtype=dtype, amplitude=1e4)
    expected = call.reference()
    if rounds_to_bfloat16(isa, call):
        # So large, rounding a query moves scores by tens: what counts is the answer to the rounded query.
        factor = call.scale * 1.44269504  # of the exponent to base 2; the kernel rounds the product
        expected = replace(call, q=(call.q * factor).bfloat16().float() / factor).reference()
    # At this size one unit in the last place of a score is a thousandth, which the weights show.
    assert_close("attention", expected, call.run(), 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 70])
@pytest.mark.parametrize("key", [0, 255, 256, 521])
def test_all_weight_on_one_key_gives_its_value(isa, key, num_queries, dtype):
    call = make_call([num_queries], [600], group=1, num_kv_heads=1, dtype=dtype)
    page, offset = int(call.page_table[0, key // ops.PAGE_TOKENS]), key % ops.PAGE_TOKENS
    call.q.fill_(1.0)
    call.k_cache.copy_(call.k_cache.clamp(-1, 1))
    call.k_cache[page, 0, offset] = 200.0
    value = call.v_cache[page, 0, offset].float()
    assert torch.allclose(call.run(), value.expand(num_queries, -1), rtol=1e-6, atol=1e-6)


def test_a_later_key_is_not_seen(isa):
    call = make_call([70], [70], group=1, num_kv_heads=1)
    before = call.run()
    page = int(call.page_table[0, 0])
    call.k_cache[page, 0, 40] = 50.0
    call.v_cache[page, 0, 40] = -50.0
    after = call.run()
    assert torch.equal(before[:40], after[:40])
    assert (before[40:] != after[40:]).any(-1).all()


def test_a_mask_off_by_one_would_be_noticed(assert_close):
    call = make_call([40, 1], [40, 300])
    shorter = replace(call, kv_lengths=call.kv_lengths - torch.tensor([0, 1]).int())
    with pytest.raises(AssertionError, match="differs"):
        assert_close("one key less", call.reference(), shorter.run(), 1e-4)


def test_one_wrong_page_would_be_noticed(assert_close):
    call = make_call([1], [600])
    swapped = replace(call, page_table=call.page_table[:, [1, 0, 2, 3]].contiguous())
    with pytest.raises(AssertionError, match="differs"):
        assert_close(
            "swapped pages", call.reference(), replace(swapped, kv_lengths=call.kv_lengths - 200).run(), 1e-4
        )


def test_a_sequence_without_queries_or_keys_is_left_alone(isa, assert_close):
    call = make_call([2, 0, 3], [10, 300, 0])
    out = call.run()
    assert torch.equal(out[2:], torch.zeros_like(out[2:]))
    assert_close("attention", call.reference()[:2], out[:2], 2e-6)


def test_queries_before_the_first_key_give_zeros(isa):
    call = make_call([5, 70], [3, 60])
    out = call.run()
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))
    assert torch.equal(out[5:15], torch.zeros_like(out[5:15]))
    assert out[15:].any(-1).all()


def test_no_sequences_at_all_is_fine(isa):
    assert make_call([], []).run().shape == (0, 256)


@pytest.mark.parametrize(("query_lengths", "kv_lengths"), [([1, 3], [3000, 5]), ([300], [900])])
def test_out_may_be_q(isa, query_lengths, kv_lengths):
    call = make_call(query_lengths, kv_lengths, dtype=torch.bfloat16)
    expected = call.run()
    assert torch.equal(ops.attention(**vars(call), out=call.q.flatten(1)), expected)
    assert torch.equal(call.q.flatten(1), expected)


def test_the_gate_and_the_choice_of_rows_come_last(isa, assert_close):
    call = make_call([3, 40], [300, 500])
    gate = torch.randn(20, 4 * 64)
    out = ops.attention(**vars(call), gate=gate, rows=slice(23, 43))
    expected = ops.attention_reference(**vars(call), gate=gate, rows=slice(23, 43))
    assert_close("attention", expected, out, 2e-6)
    assert torch.equal(ops.attention(**vars(call), rows=slice(23, 43)), call.run()[23:])
    assert ops.attention(**vars(call), rows=slice(0, 0)).shape == (0, 256)


@pytest.mark.parametrize(("query_lengths", "kv_lengths"), [([1, 3], [3000, 5]), ([300, 1], [900, 2000])])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_nothing(dtype, query_lengths, kv_lengths):
    call = make_call(query_lengths, kv_lengths, dtype=dtype)
    before = ops.num_threads()
    results = []
    try:
        for num_threads in (1, 2, 5):
            ops.set_num_threads(num_threads)
            results.append(call.run())
    finally:
        ops.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_sequence_does_not_depend_on_its_neighbours(isa):
    call = make_call([2, 40, 1], [1500, 300, 700], dtype=torch.bfloat16)
    whole = call.run()
    for s in range(3):
        first, end = int(call.query_start[s]), int(call.query_start[s + 1])
        alone = replace(
            call,
            q=call.q[first:end].contiguous(),
            page_table=call.page_table[s : s + 1].contiguous(),
            query_start=torch.tensor([0, end - first]).int(),
            kv_lengths=call.kv_lengths[s : s + 1].contiguous(),
        )
        assert torch.equal(alone.run(), whole[first:end])


def test_a_replay_reads_new_lengths_and_pages(isa):
    call = make_call([1, 2], [2100, 400], dtype=torch.bfloat16)
    pages, lengths = call.page_table.clone(), call.kv_lengths.clone()
    call.page_table.zero_()
    call.kv_lengths.fill_(3)
    graph = ops.CpuGraph()
    with graph.capture():
        out = ops.attention(**vars(call))
    call.page_table.copy_(pages)
    call.kv_lengths.copy_(lengths)
    graph.replay()
    assert torch.equal(out, call.run())
    call.kv_lengths.copy_(torch.tensor([257, 2]))
    graph.replay()
    assert torch.equal(out, call.run())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", torch.zeros(3, 4, 64).half()),
        ("q", torch.zeros(3, 5, 64)),
        ("q", torch.zeros(3, 4, 63)),
        ("k_cache", torch.zeros(3, 2, 256, 64, dtype=torch.float64)),
        ("v_cache", torch.zeros(3, 2, 256, 64).half()),
        ("page_table", torch.zeros(2, 3, dtype=torch.int64)),
        ("query_start", torch.zeros(2, dtype=torch.int32)),
        ("kv_lengths", torch.zeros(2)),
        ("out", torch.zeros(2, 256)),
        ("out", torch.zeros(3, 4, 64)),
        ("gate", torch.zeros(2, 256)),
        ("gate", torch.zeros(3, 256).half()),
        ("rows", slice(0, 3, 2)),
    ],
)
def test_what_does_not_fit_is_refused(name, value):
    with pytest.raises(ValueError, match="attention"):
        ops.attention(**{**vars(make_call([1, 2], [300, 2])), name: value})


def test_the_highest_instruction_set_is_restored():
    highest = _C.cpu_isa()
    _C.limit_isa(0)
    assert _C.cpu_isa() == "portable"
    _C.limit_isa(3)
    assert _C.cpu_isa() == highest
