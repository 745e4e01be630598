"""The attention layer with heads that run on tensor cores, against the same in torch."""

import numpy as np
import pytest
import torch
from torch import Tensor

from helexa import ops
from helexa.layers.attention import Attention
from helexa.layers.linear import Scope
from helexa.layers.norm import RMSNorm
from helexa.layers.step import Step

pytestmark = pytest.mark.cuda

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 96, 4, 2, 64
NAMES = {
    f"{name}_{kind}": name for name, kind in (("q", "proj"), ("k", "proj"), ("v", "proj"), ("o", "proj"))
}
NAMES |= {"q_norm": "q_norm", "k_norm": "k_norm"}


class Arrays:
    """A source of float32 arrays on a device."""

    def __init__(self, arrays: dict[str, np.ndarray], device: str):
        self.arrays, self.device = arrays, torch.device(device)

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def linear(self, name, blocks=None):
        array = self.arrays[name]
        if blocks is not None:
            array = np.concatenate([array[first:end] for first, end in blocks])
        return ops.pack_weight("f32", array.tobytes(), *array.shape, device=self.device)

    table = linear

    def vector(self, name):
        return torch.from_numpy(self.arrays[name]).to(self.device)


def make_layer(device: str) -> tuple[Attention, dict[str, Tensor]]:
    generator = np.random.default_rng(0)
    rows = {"q": 2 * HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    arrays = {
        f"{name}.weight": generator.standard_normal((n, HIDDEN)) / HIDDEN**0.5 for name, n in rows.items()
    }
    arrays |= {f"{name}.bias": generator.standard_normal(n) / 4 for name, n in rows.items()}
    arrays["o.weight"] = generator.standard_normal((HIDDEN, HEADS * HEAD_DIM)) / 16
    arrays |= {f"{name}_norm.weight": 1 + generator.standard_normal(HEAD_DIM) / 8 for name in "qk"}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    layer = Attention(
        Scope(Arrays(arrays, device), NAMES),
        0,
        hidden_size=HIDDEN,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        scale=HEAD_DIM**-0.5,
        rope_interleaved=False,
        bias=True,
        qk_norm=True,
        eps=1e-6,
        output_gate=True,
    )
    return layer, {name: torch.from_numpy(array) for name, array in arrays.items()}


def make_step(query_lengths: list[int], former_lengths: list[int]) -> tuple[Step, Tensor]:
    """A step of sequences that have some keys already, and the table of its rotations; on the CPU."""
    lengths = torch.tensor(query_lengths) + torch.tensor(former_lengths)
    starts = torch.tensor([0, *query_lengths]).cumsum(0).int()
    table = (torch.randperm(len(query_lengths) * 2) + 1).int().view(-1, 2)
    positions = [torch.arange(f, f + n) for f, n in zip(former_lengths, query_lengths, strict=True)]
    slots = [
        table[s, p // ops.PAGE_TOKENS] * ops.PAGE_TOKENS + p % ops.PAGE_TOKENS
        for s, p in enumerate(positions)
    ]
    shape = (len(query_lengths) * 2 + 1, KV_HEADS, ops.PAGE_TOKENS, HEAD_DIM)
    caches = [torch.full(shape, torch.nan, dtype=torch.bfloat16) for _ in range(2)]
    for s, length in enumerate(former_lengths):
        for position in range(length):
            page, offset = table[s, position // ops.PAGE_TOKENS], position % ops.PAGE_TOKENS
            for cache in caches:
                cache[page, :, offset] = torch.randn(KV_HEADS, HEAD_DIM).bfloat16()
    step = Step(
        token_ids=torch.zeros(0, dtype=torch.int32),
        positions=torch.cat(positions).int(),
        slots=torch.cat(slots).int(),
        query_start=starts,
        kv_lengths=lengths.int(),
        page_table=table,
        k_cache=[caches[0]],
        v_cache=[caches[1]],
        logits_rows=slice(None),
    )
    inv_freq = 1e4 ** -(torch.arange(0, 32, 2) / 32)  # half of the head is rotated
    return step, ops.rope_table_reference(step.positions, inv_freq)


def on(device: str, step: Step) -> Step:
    fields = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(step).items()
    }
    caches = {name: [cache.clone().to(device) for cache in fields[name]] for name in ("k_cache", "v_cache")}
    return Step(**{**fields, **caches})


def reference(arrays: dict[str, Tensor], x: Tensor, rope: Tensor, step: Step, rows: slice) -> Tensor:
    def project(name: str) -> Tensor:
        return x @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]

    both = project("q").view(len(x), HEADS, 2, HEAD_DIM)
    q = ops.rope_append_reference(
        torch.cat([both[:, :, 0].flatten(1), project("k"), project("v")], dim=1),
        rope,
        step.slots,
        step.k_cache[0],
        step.v_cache[0],
        num_heads=HEADS,
        q_norm=arrays["q_norm.weight"],
        k_norm=arrays["k_norm.weight"],
        eps=1e-6,
        interleaved=False,
    )
    tables = (step.page_table, step.query_start, step.kv_lengths)
    gate = both[:, :, 1].flatten(1)[rows]
    caches = (step.k_cache[0], step.v_cache[0])
    out = ops.attention_reference(q, *caches, *tables, HEAD_DIM**-0.5, gate=gate, rows=rows)
    return out @ arrays["o.weight"].T


@pytest.mark.parametrize(
    ("query_lengths", "former_lengths", "rows"),
    [
        ([1], [300], slice(None)),
        ([1, 4, 1], [10, 200, 300], slice(None)),
        ([5, 1], [0, 130], slice(4, 6)),
        ([70, 3], [0, 270], slice(None)),
        ([80], [100], slice(79, 80)),
    ],
)
def test_it_equals_the_same_in_torch(cuda_device, query_lengths, former_lengths, rows):
    torch.manual_seed(0)
    layer, arrays = make_layer(cuda_device)
    step, rope = make_step(query_lengths, former_lengths)
    x = torch.randn(sum(query_lengths), HIDDEN)
    device_step = on(cuda_device, step)
    expected = reference(arrays, x, rope, step, rows)
    before = torch.randn(expected.shape)
    residual, norm = before.clone().to(cuda_device), RMSNorm(torch.ones(HIDDEN, device=cuda_device), 1e-6)
    normed = layer(
        ops.quantize_rows(x.to(cuda_device)), rope.to(cuda_device), device_step, rows, residual, norm
    )
    found = residual.cpu() - before
    assert normed.num_rows == len(expected)
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.03
    for cache, expected_cache in ((device_step.k_cache, step.k_cache), (device_step.v_cache, step.v_cache)):
        assert torch.equal(cache[0].isnan().cpu(), expected_cache[0].isnan())
    ungated = reference(arrays | {"q.weight": arrays["q.weight"].roll(64, 0)}, x, rope, step, rows)
    assert (found - ungated).square().mean() > 0.1 * expected.square().mean()
