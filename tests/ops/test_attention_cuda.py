import importlib
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from helexa import ops
from support.kv_caches import cache_values, make_cache, random_pages

pytestmark = pytest.mark.cuda

attention_module = importlib.import_module("helexa.ops.attention")  # ops.attention is the function

# A result in int8 is off by up to 1/254 of the greatest of its 32 values, one in bfloat16 by 1/512 of itself.
TOLERANCE = 8e-3
BYTES = [torch.float8_e4m3fn, torch.int8]


@dataclass(frozen=True)
class Call:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor
    query_start: Tensor
    kv_lengths: Tensor
    scale: float
    gate: Tensor | None = None
    rows: slice = field(default_factory=lambda: slice(None))

    def run(self) -> ops.Rows:
        """With nothing but NaN in the memory for the result."""
        like = ops.attention(**vars(self))
        forms = [like] if isinstance(like, Tensor) else [like.q8, like.bf16]
        for form in forms:
            if form is not None:
                form.view(torch.uint8).fill_(0xFF)
        return ops.attention(**vars(self), out=like)

    def reference(self) -> Tensor:
        caches = {name: cache_values(getattr(self, name)) for name in ("k_cache", "v_cache")}
        return ops.attention_reference(**{**vars(self), **caches})


def make_call(
    device,
    query_lengths,
    kv_lengths,
    *,
    group=2,
    num_kv_heads=2,
    head_dim=64,
    dtype=torch.bfloat16,
    amplitude=1.0,
) -> Call:
    """Random queries, keys and values in shuffled pages; what belongs to no key is NaN."""
    k_cache, v_cache, page_table = random_pages(kv_lengths, num_kv_heads, head_dim)
    query_start = torch.tensor([0, *query_lengths]).cumsum(0).int()
    q = torch.randn(int(query_start[-1]), num_kv_heads * group, head_dim) * amplitude
    tensors = (
        q.to(torch.float16 if dtype in BYTES else dtype),
        make_cache(k_cache, dtype),
        make_cache(v_cache, dtype),
        page_table,
        query_start,
        torch.tensor(kv_lengths).int(),
    )
    return Call(*(tensor.to(device) for tensor in tensors), head_dim**-0.5)


def bits(rows: ops.Rows) -> Tensor:
    form = rows if isinstance(rows, Tensor) else rows.q8 if rows.q8 is not None else rows.bf16
    assert form is not None
    return form.view(torch.uint8)


@pytest.fixture
def check(cuda_device, assert_close, decoded):
    def run(query_lengths, kv_lengths, tolerance=TOLERANCE, **options) -> None:
        call = make_call(cuda_device, query_lengths, kv_lengths, **options)
        assert_close("attention", call.reference(), decoded(call.run()), tolerance)

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *BYTES])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_ragged_sequences_equal_the_reference(check, head_dim, group, dtype):
    check((5, 1, 33, 2), (5, 300, 213, 500), group=group, num_kv_heads=1, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, *BYTES])
@pytest.mark.parametrize("head_dim", [1, 20, 63, 80, 128, 512])
def test_other_shapes_are_computed_in_float32(check, head_dim, dtype):
    if (head_dim != 128 or dtype == torch.float32) and (head_dim % 4 == 0 or dtype != torch.int8):
        check((3, 1, 40), (3, 257, 290), 2e-6, group=3, num_kv_heads=1, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize(
    "length", [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, 1025, 2049]
)
@pytest.mark.parametrize("num_queries", [1, 7])
def test_every_border_of_tiles_pages_and_splits_is_right(check, num_queries, length, head_dim):
    check((min(num_queries, length),), (length,), head_dim=head_dim, num_kv_heads=1)


@pytest.mark.parametrize("num_queries", [1, 2, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 127, 129, 200])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_every_number_of_queries_works(check, head_dim, num_queries):
    check((num_queries,), (num_queries + 261,), head_dim=head_dim, num_kv_heads=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *BYTES])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_step_of_prompts_and_decoding_sequences(check, head_dim, dtype):
    lengths = (300, 900, 16, 400, 1, 130)
    check((70, 1, 16, 17, 1, 3), lengths, head_dim=head_dim, group=3, num_kv_heads=1, dtype=dtype)


def test_a_long_context_is_joined_from_many_splits(check, monkeypatch):
    monkeypatch.setattr(attention_module, "num_multiprocessors", lambda device: 132)
    check((1, 4, 1), (9000, 3075, 1), group=4, num_kv_heads=1, head_dim=128)


def test_splits_keep_to_their_memory(check, monkeypatch):
    monkeypatch.setattr(attention_module, "MAX_SPLIT_BYTES", 3 * 4 * (2 * 128 + 8) * 3)
    check((1, 1, 1), (1500, 700, 300), group=4, num_kv_heads=1, head_dim=128)


def test_more_sequences_than_a_warp_has_lanes(check):
    check((1,) * 30 + (0, 2) + (1,) * 8, tuple(range(100, 420, 8)), head_dim=64, num_kv_heads=1)


def test_more_heads_in_a_group_than_rows_in_a_block(check):
    check((3, 1), (300, 2), group=150, num_kv_heads=1)


@pytest.mark.parametrize("num_queries", [1, 70])
def test_scores_of_ten_thousand_stay_finite(check, num_queries):
    check((num_queries,), (600,), 1e-2, amplitude=1e4, head_dim=128)


@pytest.mark.parametrize("num_queries", [1, 70])
@pytest.mark.parametrize("key", [0, 255, 256, 521])
def test_all_weight_on_one_key_gives_its_value(cuda_device, decoded, key, num_queries):
    call = make_call(cuda_device, [num_queries], [600], group=1, num_kv_heads=1)
    page, offset = int(call.page_table[0, key // ops.PAGE_TOKENS]), key % ops.PAGE_TOKENS
    call.q.fill_(1.0)
    call.k_cache.copy_(call.k_cache.clamp(-1, 1))
    call.k_cache[page, 0, offset] = 200.0
    value = call.v_cache[page, 0, offset].float().expand(num_queries, -1)
    assert (decoded(call.run()) - value).abs().max() <= value.abs().max() / 250


@pytest.mark.parametrize("num_queries", [60, 70])
def test_a_later_key_is_not_seen(cuda_device, num_queries):
    call = make_call(cuda_device, [num_queries], [num_queries], group=1, num_kv_heads=1)
    before = bits(call.run()).clone()
    page = int(call.page_table[0, 0])
    call.k_cache[page, 0, 40] = 50.0
    call.v_cache[page, 0, 40] = -50.0
    after = bits(call.run())
    assert torch.equal(before[:40], after[:40])
    assert (before[40:] != after[40:]).any(-1).all()


@pytest.mark.parametrize("query_lengths", [[40, 1], [80, 1]])
def test_a_mask_off_by_one_would_be_noticed(cuda_device, assert_close, decoded, query_lengths):
    call = make_call(cuda_device, query_lengths, [80, 60])
    shorter = replace(call, kv_lengths=call.kv_lengths - torch.tensor([0, 1], device=cuda_device).int())
    with pytest.raises(AssertionError, match="differs"):
        assert_close("one key less", call.reference(), decoded(shorter.run()), TOLERANCE)


def test_a_sequence_without_queries_or_keys_is_left_alone(cuda_device, assert_close, decoded):
    call = make_call(cuda_device, [2, 0, 3], [10, 300, 0], head_dim=128)
    out = decoded(call.run())
    assert torch.equal(out[2:], torch.zeros_like(out[2:]))
    assert_close("attention", call.reference()[:2], out[:2], TOLERANCE)


@pytest.mark.parametrize("query_lengths", [[5, 60], [5, 70]])
def test_queries_before_the_first_key_give_zeros(cuda_device, decoded, query_lengths):
    call = make_call(cuda_device, query_lengths, [3, 60])
    out = decoded(call.run())
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))
    first = 5 + query_lengths[1] - 60
    assert torch.equal(out[5:first], torch.zeros_like(out[5:first]))
    assert out[first:].any(-1).all()


def test_no_sequences_at_all_is_fine(cuda_device):
    out = ops.attention(**vars(make_call(cuda_device, [], [])))
    assert isinstance(out, ops.Activation)
    assert out.num_rows == 0


def test_a_decoding_sequence_does_not_depend_on_its_neighbours(cuda_device):
    call = make_call(cuda_device, [2, 8, 1, 1], [1500, 300, 700, 40], head_dim=128)
    whole = bits(call.run())
    for s in range(4):
        first, end = int(call.query_start[s]), int(call.query_start[s + 1])
        alone = replace(
            call,
            q=call.q[first:end].contiguous(),
            page_table=call.page_table[s : s + 1].contiguous(),
            query_start=torch.tensor([0, end - first], device=cuda_device).int(),
            kv_lengths=call.kv_lengths[s : s + 1].contiguous(),
        )
        assert torch.equal(bits(alone.run()), whole[first:end])


@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("query_lengths", "kv_lengths", "rows"),
    [
        ([3, 2], [300, 500], slice(None)),
        ([3, 1, 4], [300, 1500, 400], slice(4, 7)),
        ([70, 40, 1], [300, 500, 600], slice(None)),
        ([70, 40, 1], [300, 500, 600], slice(69, 111)),
        ([70, 40, 1], [300, 500, 600], slice(110, 111)),
    ],
)
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(128, torch.bfloat16), (64, torch.bfloat16), (40, torch.float32)]
)
def test_the_gate_and_the_choice_of_rows_are_part_of_it(
    cuda_device, assert_close, decoded, head_dim, dtype, query_lengths, kv_lengths, rows, gate_dtype
):
    call = make_call(cuda_device, query_lengths, kv_lengths, head_dim=head_dim, dtype=dtype)
    width = 4 * head_dim
    projected = torch.randn(len(call.q), 3 * width, device=cuda_device).to(gate_dtype)
    gated = replace(call, gate=projected[rows, -width:], rows=rows)
    assert_close("attention", gated.reference(), decoded(gated.run()), TOLERANCE)
    chosen = replace(call, rows=rows)
    assert_close("attention", chosen.reference(), decoded(chosen.run()), TOLERANCE)


def test_no_rows_at_all_cost_nothing(cuda_device):
    call = make_call(cuda_device, [3], [300])
    out = ops.attention(**vars(replace(call, rows=slice(0, 0))))
    assert isinstance(out, ops.Activation)
    assert out.num_rows == 0


def test_a_replay_reads_new_lengths_and_pages(cuda_device):
    if cuda_device == "cpu":
        pytest.skip("the host has no graphs")
    call = make_call(cuda_device, [1, 2], [2100, 400], head_dim=128)
    ops.attention(**vars(call))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attention(**vars(call))
    for lengths in ([2100, 400], [257, 2], [1999, 300], [2100, 400]):
        call.kv_lengths.copy_(torch.tensor(lengths))
        call.q.copy_(torch.randn_like(call.q))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(bits(out), bits(call.run()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", torch.zeros(3, 4, 64).double()),
        ("q", torch.zeros(3, 5, 64)),
        ("k_cache", torch.zeros(3, 2, 256, 64, dtype=torch.float64)),
        ("k_cache", torch.zeros(3, 2, 256, 64, dtype=torch.int8)),
        ("page_table", torch.zeros(2, 3, dtype=torch.int64)),
        ("query_start", torch.zeros(2, dtype=torch.int32)),
        ("kv_lengths", torch.zeros(2)),
        ("out", torch.zeros(3, 256)),
        ("gate", torch.zeros(3, 255)),
        ("gate", torch.zeros(3, 512)[:, ::2]),
        ("gate", torch.zeros(3, 257)[:, :256]),
        ("gate", torch.zeros(3, 256).half()),
    ],
)
def test_what_does_not_fit_is_refused(cuda_device, name, value):
    there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=cuda_device)
    call = {**vars(make_call(cuda_device, [1, 2], [300, 2])), name: there}
    with pytest.raises(ValueError, match="attention"):
        ops.attention(**call)
