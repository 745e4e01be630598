import importlib
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from helexa import ops
from support.kv_caches import make_cache, random_pages
from support.rope_calls import inverse_frequencies

pytestmark = pytest.mark.cuda

BYTES = [torch.float8_e4m3fn, torch.int8]


@dataclass(frozen=True)
class Call:
    qkv: Tensor
    table: Tensor
    slots: Tensor
    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor
    query_start: Tensor
    kv_lengths: Tensor
    scale: float
    num_heads: int
    q_norm: Tensor | None
    k_norm: Tensor | None
    interleaved: bool
    gate: Tensor | None = None
    rows: slice = field(default_factory=lambda: slice(None))
    eps: float = 1e-6

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """The bits of the result and of the caches, which are copies."""
        call = replace(self, k_cache=self.k_cache.clone(), v_cache=self.v_cache.clone())
        return bits(ops.rope_attention(**vars(call))), as_bytes(call.k_cache), as_bytes(call.v_cache)

    def run_apart(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same by two launches."""
        call = {**vars(self), "k_cache": self.k_cache.clone(), "v_cache": self.v_cache.clone()}
        of_attention = {"page_table", "query_start", "kv_lengths", "scale", "gate", "rows"}
        q = ops.rope_append(**{name: value for name, value in call.items() if name not in of_attention})
        caches = (call["k_cache"], call["v_cache"])
        more = {name: call[name] for name in of_attention}
        return bits(ops.attention(q, *caches, **more)), *map(as_bytes, caches)


def as_bytes(cache: Tensor) -> Tensor:
    return cache.view(torch.uint8)


def bits(rows: ops.Rows) -> Tensor:
    assert isinstance(rows, ops.Activation)
    assert rows.q8 is not None
    return rows.q8


def make_call(
    device,
    query_lengths,
    kv_lengths,
    *,
    group=2,
    num_kv_heads=2,
    head_dim=64,
    dtype=torch.bfloat16,
    num_rotated=None,
    norms=True,
    interleaved=False,
    more_columns=0,
) -> Call:
    """A step of sequences in shuffled pages; what belongs to no key of an earlier step is NaN."""
    k_cache, v_cache, page_table = random_pages(kv_lengths, num_kv_heads, head_dim)
    slots, positions = [], []
    for s, (num_queries, length) in enumerate(zip(query_lengths, kv_lengths, strict=True)):
        for position in range(length - num_queries, length):
            page, offset = int(page_table[s, position // ops.PAGE_TOKENS]), position % ops.PAGE_TOKENS
            slots.append(page * ops.PAGE_TOKENS + offset)
            positions.append(position)
            for cache in (k_cache, v_cache):
                cache[page, :, offset] = torch.nan
    num_rotated = head_dim if num_rotated is None else num_rotated
    num_heads = num_kv_heads * group
    width = (num_heads + 2 * num_kv_heads) * head_dim
    call = Call(
        qkv=torch.randn(len(slots), width + more_columns)[:, :width],
        table=ops.rope_table_reference(torch.tensor(positions).int(), inverse_frequencies(num_rotated)),
        slots=torch.tensor(slots).int(),
        k_cache=make_cache(k_cache, dtype),
        v_cache=make_cache(v_cache, dtype),
        page_table=page_table,
        query_start=torch.tensor([0, *query_lengths]).cumsum(0).int(),
        kv_lengths=torch.tensor(kv_lengths).int(),
        scale=head_dim**-0.5,
        num_heads=num_heads,
        q_norm=torch.randn(head_dim) if norms else None,
        k_norm=torch.randn(head_dim) if norms else None,
        interleaved=interleaved,
    )
    return replace(
        call, **{name: value.to(device) for name, value in vars(call).items() if isinstance(value, Tensor)}
    )


def check(call: Call) -> None:
    for name, together, apart in zip(("result", "k", "v"), call.run(), call.run_apart(), strict=True):
        assert torch.equal(together, apart), name


@pytest.fixture
def launches(monkeypatch):
    """Which of the two ops ran by itself."""
    module = importlib.import_module("helexa.ops.rope_attention")
    seen = []
    monkeypatch.setattr(
        module, "rope_append", lambda *a, **k: seen.append("append") or ops.rope_append(*a, **k)
    )
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *BYTES])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_one_launch_gives_the_bits_of_two(cuda_device, launches, head_dim, dtype, group):
    check(make_call(cuda_device, [1, 3, 1], [300, 20, 1], head_dim=head_dim, dtype=dtype, group=group))
    assert launches == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("num_queries", [1, 2, 16])
@pytest.mark.parametrize("length", [16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 255, 256, 257, 271, 513, 1025])
def test_every_place_of_the_new_keys(cuda_device, length, num_queries, dtype):
    check(make_call(cuda_device, [num_queries], [length], group=4, num_kv_heads=1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize(("num_queries", "group"), [(1, 8), (8, 8), (7, 5), (16, 4)])
@pytest.mark.parametrize("length", [1030, 1290, 2049])
def test_new_keys_in_one_or_two_of_many_splits(cuda_device, monkeypatch, length, num_queries, group, dtype):
    module = importlib.import_module("helexa.ops.attention")
    monkeypatch.setattr(module, "num_multiprocessors", lambda device: 132)
    check(
        make_call(
            cuda_device, [num_queries], [length], group=group, num_kv_heads=1, head_dim=128, dtype=dtype
        )
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("head_dim", "num_rotated"), [(128, 128), (128, 32), (256, 64)])
def test_norms_and_rotations(cuda_device, head_dim, num_rotated, norms, interleaved):
    shape = {"head_dim": head_dim, "num_rotated": num_rotated, "norms": norms, "interleaved": interleaved}
    check(make_call(cuda_device, [2, 1], [40, 300], **shape))


def test_without_the_rotation_the_result_differs(cuda_device):
    call = make_call(cuda_device, [1], [300])
    together, *_ = call.run()
    apart, *_ = replace(call, table=call.table.flip(1)).run_apart()
    assert not torch.equal(together, apart)


def test_sixteen_sequences(cuda_device):
    check(make_call(cuda_device, [1] * 16, range(1, 640, 40), group=4, more_columns=64))


@pytest.mark.parametrize("rows", [slice(4, 7), slice(2, 3), slice(0, 0)])
def test_tokens_whose_rows_are_not_wanted_are_appended(cuda_device, rows):
    call = make_call(cuda_device, [3, 1, 4], [300, 700, 40], head_dim=128, more_columns=2048)
    width = call.num_heads * 128
    gate = torch.randn(len(call.slots), 2 * width, device=cuda_device)[rows, -width:]
    check(replace(call, rows=rows, gate=gate))


def test_a_negative_slot_is_not_written(cuda_device):
    call = make_call(cuda_device, [1, 1], [300, 1])
    call.slots[1] = -1
    (_, *caches), (_, *apart) = call.run(), call.run_apart()
    assert all(torch.equal(*pair) for pair in zip(caches, apart, strict=True))


def test_a_sequence_without_queries_or_keys_is_left_alone(cuda_device):
    call = make_call(cuda_device, [1, 0, 1], [10, 300, 1], head_dim=128)
    call.slots[1] = -1
    call.kv_lengths[2] = 0
    check(call)


@pytest.mark.parametrize(
    ("num_queries", "group", "options"),
    [(17, 1, {}), (9, 8, {}), (3, 2, {"dtype": torch.float32}), (3, 2, {"head_dim": 40})],
)
def test_other_steps_take_two_launches(cuda_device, launches, num_queries, group, options):
    call = make_call(cuda_device, [num_queries], [300], group=group, **options)
    out = ops.rope_attention(**vars(call))
    assert launches == ["append"]
    assert out.shape[0] == num_queries if isinstance(out, Tensor) else out.num_rows == num_queries


def test_a_replay_reads_new_slots_and_lengths(cuda_device):
    if cuda_device == "cpu":
        pytest.skip("the host has no graphs")
    call = make_call(cuda_device, [1, 2], [2100, 400], head_dim=128)
    ops.rope_attention(**vars(call))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.rope_attention(**vars(call))
    for less in (0, 1, 300):
        lengths = torch.tensor([2100 - less, 400 - min(less, 90)], device=cuda_device)
        positions = torch.stack([lengths[0] - 1, lengths[1] - 2, lengths[1] - 1])
        pages = call.page_table[torch.tensor([0, 1, 1], device=cuda_device), positions // ops.PAGE_TOKENS]
        call.kv_lengths.copy_(lengths)
        call.slots.copy_(pages * ops.PAGE_TOKENS + positions % ops.PAGE_TOKENS)
        call.qkv.copy_(torch.randn_like(call.qkv))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(bits(out), call.run()[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qkv", torch.zeros(3, 10)),
        ("table", torch.zeros(3, 40, 2)),
        ("slots", torch.zeros(3)),
        ("k_cache", torch.zeros(3, 2, 128, 64)),
        ("q_norm", torch.zeros(63)),
        ("page_table", torch.zeros(2, 3, dtype=torch.int64)),
        ("query_start", torch.zeros(2, dtype=torch.int32)),
        ("kv_lengths", torch.zeros(2)),
        ("gate", torch.zeros(3, 255)),
        ("num_heads", 5),
        ("rows", slice(None, None, 2)),
    ],
)
def test_what_does_not_fit_is_refused(cuda_device, name, value):
    value = value.to(cuda_device) if isinstance(value, Tensor) else value
    call = {**vars(make_call(cuda_device, [1, 2], [300, 2])), name: value}
    with pytest.raises(ValueError, match=r"rope_attention|rope_append|attention"):
        ops.rope_attention(**call)
