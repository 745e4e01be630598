"""Routing and experts on a device against their references."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from helexa import ops
from helexa.ops import moe
from helexa.ops.moe import moe_route, moe_route_reference, sparse_moe, sparse_moe_reference
from support.random_weights import random_raw

pytestmark = pytest.mark.cuda


@dataclass(frozen=True)
class Layer:
    """A mixture of experts whose results have sizes as those of trained ones."""

    router: ops.PackedWeight
    gate_up: list[ops.PackedWeight]
    down: ops.PackedWeight
    top_k: int
    normalize: bool = True
    shared: ops.SharedExpert | None = None

    def arguments(self):
        names = ("router", "gate_up", "down", "top_k", "normalize", "shared")
        return {name: getattr(self, name) for name in names}


def matrix(format, rows, cols, device, seed=0, scale=1.0):
    """Random codes for quantized formats, whose values are about 1; normal values for float ones."""
    if format in ("f32", "f16", "bf16"):
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[format]
        values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * scale
        raw = values.to(dtype).view(torch.uint8).numpy().tobytes()
    else:
        raw = random_raw(format, rows, cols, seed)
    return ops.pack_weight(format, raw, rows, cols, device)


def make_layer(device, formats, experts, hidden, width, top_k, *, fused=False, shared=None, normalize=True):
    """formats: of gate, up, down, and of the shared expert's gate and up, and down."""
    router = matrix("f32", experts, hidden, device, 1, hidden**-0.5)
    sizes = [
        ("gate", experts * width, hidden),
        ("up", experts * width, hidden),
        ("down", experts * hidden, width),
    ]
    if fused:
        sizes[:2] = [("gate_up", 2 * experts * width, hidden)]
    stacks = [
        matrix(format, rows, cols, device, seed, cols**-0.5)
        for seed, (format, (_, rows, cols)) in enumerate(zip(formats[fused:], sizes, strict=False))
    ]
    expert = None
    if shared is not None:
        rows = [matrix(formats[3], shared, hidden, device, 10 + i, hidden**-0.5) for i in range(2)]
        down = matrix(formats[4], hidden, shared, device, 12, shared**-0.5)
        expert = ops.SharedExpert(rows, down, matrix("bf16", 1, hidden, device, 13, hidden**-0.5))
    return Layer(router, stacks[:-1], stacks[-1], top_k, normalize, expert)


def activation(x: Tensor) -> ops.Activation:
    """Rows as layers get them: norms write what matmuls read."""
    rows = ops.rms_norm(x, torch.ones(x.shape[1], device=x.device), 1e-6, keep_float=True)
    assert isinstance(rows, ops.Activation)
    return rows


def run(layer, x: ops.Activation) -> Tensor:
    dtype = torch.float32 if x.num_rows <= ops.MAX_MATVEC_ROWS else torch.bfloat16
    out = torch.full_like(x.x, torch.nan, dtype=dtype)
    assert sparse_moe(x, **layer.arguments(), out=out) is out
    return out.float()


def expected(layer, x: ops.Activation) -> Tensor:
    is_few = x.num_rows <= moe.MAX_DECODE_ROWS
    return sparse_moe_reference(x.x, **layer.arguments(), rounded=is_few)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(1, 1, 1), (3, 7, 7), (5, 128, 8), (13, 512, 10), (2, 33, 1), (70, 160, 6), (2, 1024, 32)],
)
def test_routes_are_those_of_the_reference(cuda_device, tokens, experts, top_k, normalize, assert_close):
    logits = torch.randn(tokens, experts) * 3
    ids = torch.full((tokens, top_k), -1, dtype=torch.int32, device=cuda_device)
    weights = torch.full((tokens, top_k), torch.nan, device=cuda_device)
    moe_route(logits.to(cuda_device), top_k, normalize=normalize, ids=ids, weights=weights)
    expected_ids, expected = moe_route_reference(logits, top_k, normalize=normalize)
    assert torch.equal(ids.cpu(), expected_ids)
    assert_close("weights", expected, weights.cpu(), 1e-6)


def test_equal_and_extreme_logits_are_routed_in_order(cuda_device, assert_close):
    logits = torch.zeros(4, 40)
    logits[0, ::2] = -0.0
    logits[1, 5:9] = 1.0
    logits[2] = torch.linspace(-3e4, 3e4, 40)
    logits[3, :39] = -torch.inf
    ids, weights = moe_route(logits.to(cuda_device), 4, normalize=True)
    assert ids.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [39, 38, 37, 36], [39, 0, 1, 2]]
    expected = torch.tensor([[0.25] * 4, [0.25] * 4, [1.0, 0, 0, 0], [1.0, 0, 0, 0]])
    assert_close("weights", expected, weights.cpu(), 1e-6)


def test_no_expert_beyond_the_last_is_chosen_for_what_is_not_a_number(cuda_device):
    ids, weights = moe_route(torch.full((2, 40), torch.nan, device=cuda_device), 3, normalize=True)
    assert ids.tolist() == [[0, 1, 2]] * 2
    assert weights.isnan().all()


def test_more_experts_than_a_device_takes_are_refused(cuda_device):
    with pytest.raises(ValueError, match="a device takes 32 of 1024"):
        moe_route(torch.zeros(1, 1100, device=cuda_device), 3, normalize=True)


ALL = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k", "q2_k", "q3_k", "iq4_nl", "iq4_xs")


@pytest.mark.parametrize("format", [*ALL, "f32", "f16", "bf16"])
def test_every_format_equals_the_reference(cuda_device, format, assert_close):
    layer = make_layer(cuda_device, (format,) * 5, 3, 256, 256, 2, shared=256)
    x = activation(torch.randn(3, 256).to(cuda_device))
    assert_close("out", expected(layer, x), run(layer, x), 2e-3)


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("fused", [False, True])
def test_mixed_formats_and_a_shared_expert_of_another_width(cuda_device, tokens, fused, assert_close):
    formats = ("q4_k", "q4_k" if fused else "q5_k", "q5_0", "q8_0", "q6_k")
    layer = make_layer(cuda_device, formats, 7, 256, 96, 3, fused=fused, shared=512, normalize=not fused)
    x = activation(torch.randn(tokens, 256).to(cuda_device))
    assert_close("out", expected(layer, x), run(layer, x), 2e-3)


@pytest.mark.parametrize("tokens", [1, 3, 11])
@pytest.mark.parametrize("formats", [("q8_0", "q5_0", "q8_0", "q4_0", "q8_0"), ("f32",) * 5])
def test_the_norm_of_rows_is_ended(cuda_device, tokens, formats, assert_close):
    """As after a product that adds the residual: what came before the division by the root mean square."""
    layer = make_layer(cuda_device, formats, 9, 416, 96, 3, shared=64)
    values = torch.randn(tokens, 416).to(cuda_device) * torch.linspace(0.1, 20, tokens)[:, None].to(
        cuda_device
    )
    weights, eps = torch.linspace(0.5, 2, 416).to(cuda_device), 0.3
    x = ops.quantize_rows(values * weights)
    squares = functional.pad(values.square(), (0, -416 % 128)).unflatten(1, (-1, 32)).sum(2)
    x.squares, x.eps = squares, eps
    ended = ops.Activation(416, x=ops.as_float(x))
    out = sparse_moe(x, **layer.arguments())
    assert_close("out", expected(layer, ended), out, 2e-3)
    for t in range(tokens):
        assert torch.equal(sparse_moe(x[t : t + 1], **layer.arguments()), out[t : t + 1])


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize(("hidden", "width", "shared"), [(48, 16, 32), (64, 48, None), (80, 16, 16)])
def test_small_layers_of_floats(cuda_device, tokens, hidden, width, shared, assert_close):
    layer = make_layer(cuda_device, ("f32",) * 5, 5, hidden, width, 3, shared=shared)
    x = activation(torch.randn(tokens, hidden).to(cuda_device))
    assert_close("out", expected(layer, x), run(layer, x), 1e-5)


def test_odd_numbers_of_blocks(cuda_device, assert_close):
    layer = make_layer(cuda_device, ("q8_0", "q4_0", "q8_0", "q4_1", "iq4_nl"), 4, 352, 160, 2, shared=224)
    x = activation(torch.randn(3, 352).to(cuda_device))
    assert_close("out", expected(layer, x), run(layer, x), 2e-3)


def test_columns_are_split_among_warps(cuda_device, assert_close):
    """Wide experts, few of them: many runs to a warp, and several warps to a result."""
    layer = make_layer(cuda_device, ("q4_k", "q4_k", "q6_k"), 2, 2304, 1280, 1)
    x = activation(torch.randn(1, 2304).to(cuda_device))
    assert_close("out", expected(layer, x), run(layer, x), 2e-3)


@pytest.mark.parametrize("tokens", [1, 6, 9])
def test_more_experts_than_a_block_has_warps(cuda_device, tokens, assert_close):
    """Warps go from one expert to the next, the shared one of another format and width among them."""
    formats = ("q4_k", "q4_0", "q6_k", "q8_0", "q5_1")
    layer = make_layer(cuda_device, formats, 40, 256, 768, 19, shared=96, normalize=False)
    layer = replace(layer, shared=replace(layer.shared, gate=None))
    x = activation(torch.randn(tokens, 256).to(cuda_device))
    assert_close("out", expected(layer, x), run(layer, x), 2e-3)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_routers_of_half_precision_and_wider_than_a_block_reads_at_once(
    cuda_device, tokens, dtype, assert_close
):
    layer = make_layer(cuda_device, ("q8_0",) * 3, 35, 2080, 32, 4)
    layer = replace(layer, router=matrix(dtype, 35, 2080, cuda_device, 1, 0.02))
    x = activation(torch.randn(tokens, 2080).to(cuda_device))
    assert_close("out", expected(layer, x), run(layer, x), 2e-3)


def test_all_tokens_want_one_expert(cuda_device, assert_close):
    layer = make_layer(cuda_device, ("q4_k", "q4_k", "q4_k"), 6, 256, 256, 2)
    x = activation(torch.randn(1, 256).repeat(8, 1).to(cuda_device))
    assert_close("out", expected(layer, x), run(layer, x), 2e-3)


def test_a_token_is_the_same_alone_as_in_a_crowd(cuda_device):
    layer = make_layer(cuda_device, ("q4_k", "q4_k", "q6_k", "q8_0", "q8_0"), 9, 256, 256, 3, shared=256)
    x = activation(torch.randn(11, 256).to(cuda_device))
    crowd = run(layer, x)
    for t in range(11):
        assert torch.equal(run(layer, x[t : t + 1]), crowd[t : t + 1])


def test_what_is_not_a_number_stays_in_its_row(cuda_device, assert_close):
    layer = make_layer(cuda_device, ("q4_k", "q4_k", "q6_k"), 5, 256, 256, 2)
    clean = activation(torch.randn(3, 256).to(cuda_device))
    values = torch.randn(3, 256).to(cuda_device)
    values[1, 7] = torch.nan
    values[[0, 2]] = clean.x[[0, 2]]
    out = sparse_moe(activation(values), **layer.arguments())
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


# Inputs, weights and results are rounded to bfloat16; up to 64 rows the shared expert sees int8 inputs.
MANY_ROWS, SHARED_OF_64_ROWS = 6e-3, 0.012


@pytest.mark.parametrize("format", [*ALL, "f32", "f16", "bf16"])
def test_every_format_in_many_rows(cuda_device, format, assert_close):
    layer = make_layer(cuda_device, (format,) * 3, 3, 256, 256, 2)
    x = activation(torch.randn(17, 256).to(cuda_device))
    assert_close("out", expected(layer, x), run(layer, x), MANY_ROWS)


@pytest.mark.parametrize("tokens", [33, 65, 150])
def test_many_rows_of_mixed_formats_and_groups_of_all_sizes(cuda_device, tokens, assert_close):
    layer = make_layer(cuda_device, ("q4_k", "q5_k", "q5_0", "q8_0", "q6_k"), 5, 512, 160, 3, shared=256)
    x = activation(torch.randn(tokens, 512).to(cuda_device))
    assert_close("out", expected(layer, x), run(layer, x), MANY_ROWS if tokens > 64 else SHARED_OF_64_ROWS)


def test_many_rows_of_fused_stacks_without_a_shared_expert(cuda_device, assert_close):
    layer = make_layer(cuda_device, ("", "q8_0", "q4_0"), 4, 96, 352, 2, fused=True, normalize=False)
    x = activation(torch.randn(40, 96).to(cuda_device))
    assert_close("out", expected(layer, x), run(layer, x), MANY_ROWS)


def test_many_rows_of_small_layers_of_floats(cuda_device, assert_close):
    layer = make_layer(cuda_device, ("f32",) * 5, 5, 48, 16, 3, shared=32)
    x = activation(torch.randn(30, 48).to(cuda_device))
    assert_close("out", expected(layer, x), run(layer, x), MANY_ROWS)


def test_more_rows_than_are_multiplied_at_a_time(cuda_device, monkeypatch, assert_close):
    monkeypatch.setattr(moe, "_PART_ROWS", 32)
    layer = make_layer(cuda_device, ("q8_0",) * 5, 4, 64, 32, 2, shared=64)
    x = activation(torch.randn(70, 64).to(cuda_device))
    assert_close("out", expected(layer, x), run(layer, x), SHARED_OF_64_ROWS)


def test_all_of_many_tokens_want_one_expert(cuda_device, assert_close):
    layer = make_layer(cuda_device, ("q4_k", "q4_k", "q4_k"), 6, 256, 256, 1)
    router = matrix("f32", 6, 256, cuda_device, scale=0.0)  # the first of equals is chosen
    layer = replace(layer, router=router)
    x = activation(torch.randn(130, 256).to(cuda_device))
    assert_close("out", expected(layer, x), run(layer, x), MANY_ROWS)


def test_the_wrong_experts_are_seen(cuda_device, assert_close):
    layer = make_layer(cuda_device, ("q4_k", "q4_k", "q6_k"), 5, 256, 256, 2)
    x = activation(torch.randn(3, 256).to(cuda_device))
    turned = matrix("f32", 5, 256, cuda_device, 2, 256**-0.5)
    with pytest.raises(AssertionError, match="wrong"):
        assert_close("wrong", expected(layer, x), run(replace(layer, router=turned), x), 2e-3)


def test_what_does_not_fit_is_refused(cuda_device):
    layer = make_layer(cuda_device, ("q4_k", "q4_k", "q6_k"), 5, 256, 256, 2)
    x = activation(torch.randn(3, 256).to(cuda_device))
    with pytest.raises(ValueError, match="as floats"):
        sparse_moe(replace(x, x=None), **layer.arguments())
    with pytest.raises(ValueError, match="6 of 5 experts"):
        run(replace(layer, top_k=6), x)
    with pytest.raises(ValueError, match="a router"):
        run(replace(layer, router=matrix("q8_0", 5, 256, cuda_device)), x)
    with pytest.raises(ValueError, match="do not fit"):
        run(replace(layer, down=matrix("q6_k", 5 * 256, 512, cuda_device)), x)
