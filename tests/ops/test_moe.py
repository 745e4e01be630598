"""Routing and experts against their references: formats, odd counts, experts nobody or everybody wants."""

import pytest
import torch

from helexa import ops
from helexa.ops.moe import moe_mlp, moe_mlp_reference, moe_route, moe_route_reference
from support.random_weights import random_raw


def stack(format, num_experts, rows, cols, seed):
    packed = ops.pack_weight(
        format, random_raw(format, num_experts * rows, cols, seed), num_experts * rows, cols
    )
    return packed, packed.dequantize().view(num_experts, rows, cols)


def scaled(pair, factor):
    """Random codes make huge values; a float stack is scaled to sizes that trained weights have."""
    return ops.pack_weight("f32", (pair[1] * factor).numpy().tobytes(), pair[0].rows, pair[0].cols), pair[
        1
    ] * factor


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(1, 1, 1), (3, 7, 7), (5, 128, 8), (40, 512, 10), (2, 33, 1)]
)
def test_routes_are_those_of_the_reference(isa, tokens, experts, top_k, normalize, assert_close):
    logits = torch.randn(tokens, experts) * 3
    ids = torch.full((tokens, top_k), -1, dtype=torch.int32)
    weights = torch.full((tokens, top_k), torch.nan)
    moe_route(logits, top_k, normalize=normalize, ids=ids, weights=weights)
    expected_ids, expected = moe_route_reference(logits, top_k, normalize=normalize)
    assert torch.equal(ids, expected_ids)
    assert_close("weights", expected, weights, 1e-6)


def test_equal_and_extreme_logits_are_routed_in_order(isa, assert_close):
    logits = torch.zeros(3, 20)
    logits[1, 5:9] = 1.0
    logits[2] = torch.linspace(-3e4, 3e4, 20)
    ids, weights = moe_route(logits, 4, normalize=True)
    assert ids.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [19, 18, 17, 16]]
    assert_close("weights", torch.tensor([[0.25] * 4, [0.25] * 4, [1.0, 0, 0, 0]]), weights, 1e-6)


@pytest.mark.parametrize("tokens", [1, 2, 5, 13, 64])
@pytest.mark.parametrize(
    "formats",
    [("f32", "f32", "f32"), ("q4_k", "q4_k", "q6_k"), ("q8_0", "q4_0", "q5_1"), ("bf16", "q8_0", "f16")],
)
def test_experts_equal_the_reference(isa, formats, tokens):
    experts, hidden, width, top_k = 9, 256, 256, 3
    gate, up, down = (
        scaled(stack(name, experts, rows, cols, seed), 0.02)
        if name == "f32"
        else stack(name, experts, rows, cols, seed)
        for seed, (name, rows, cols) in enumerate(
            zip(formats, (width, width, hidden), (hidden, hidden, width), strict=True)
        )
    )
    x = torch.randn(tokens, hidden) * 0.1
    ids, weights = moe_route(torch.randn(tokens, experts), top_k, normalize=True)
    out = torch.full((tokens, hidden), torch.nan)
    moe_mlp(x, ids, weights, [gate[0], up[0]], down[0], num_experts=experts, out=out)
    expected = moe_mlp_reference(
        x.double(), ids, weights.double(), [gate[1].double(), up[1].double()], down[1].double()
    )
    difference = (out - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert difference < (1e-5 if formats == ("f32", "f32", "f32") else 0.04)  # inputs are rounded to int8


def test_a_fused_stack_shared_experts_and_their_gate(isa, assert_close):
    experts, hidden, width, tokens = 5, 64, 48, 6
    both = scaled(stack("f32", experts, 2 * width, hidden, 1), 0.05)
    down = scaled(stack("f32", experts, hidden, width, 2), 0.05)
    x, shared, gate = torch.randn(tokens, hidden), torch.randn(tokens, hidden), torch.randn(tokens, 1)
    ids, weights = moe_route(torch.randn(tokens, experts), 2, normalize=False)
    for options in ({}, {"shared": shared}, {"shared": shared, "shared_gate": gate}):
        expected = moe_mlp_reference(
            x.double(),
            *(ids, weights.double(), [both[1].double()], down[1].double()),
            **{name: value.double() for name, value in options.items()},
        )
        out = moe_mlp(x, ids, weights, [both[0]], down[0], num_experts=experts, **options)
        assert_close("out", expected.float(), out, 1e-5)


@pytest.mark.parametrize("format", ["q4_k", "f32"])
def test_a_token_is_the_same_alone_as_in_a_crowd(format):
    """All tokens with one expert, each with its own, and a mixture."""
    experts, size, tokens = 12, 256, 24
    gate_up = stack(format, experts, 2 * size, size, 3)[0]
    down = stack(format, experts, size, size, 4)[0]
    x = torch.randn(tokens, size)
    weights = torch.rand(tokens, 2)
    for ids in (
        torch.full((tokens, 2), 7),
        torch.arange(2 * tokens).view(tokens, 2) % experts,
        torch.randint(experts, (tokens, 2)),
    ):
        ids = ids.int()
        crowd = moe_mlp(x, ids, weights, [gate_up], down, num_experts=experts)
        alone = torch.cat(
            [
                moe_mlp(
                    x[t : t + 1], ids[t : t + 1], weights[t : t + 1], [gate_up], down, num_experts=experts
                )
                for t in range(tokens)
            ]
        )
        torch.testing.assert_close(crowd, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def test_the_wrong_expert_is_seen(assert_close):
    gate_up, values = scaled(stack("f32", 4, 32, 64, 1), 0.05)
    down, down_values = scaled(stack("f32", 4, 64, 16, 2), 0.05)
    x, ids, weights = torch.randn(3, 64), torch.tensor([[0], [1], [2]]).int(), torch.ones(3, 1)
    expected = moe_mlp_reference(x, ids, weights, [values], down_values)
    assert_close("right", expected, moe_mlp(x, ids, weights, [gate_up], down, num_experts=4), 1e-5)
    with pytest.raises(AssertionError, match="wrong"):
        assert_close("wrong", expected, moe_mlp(x, ids + 1, weights, [gate_up], down, num_experts=4), 1e-5)


def test_a_captured_call_equals_an_eager_one_with_other_experts():
    gate_up, down = stack("q4_k", 8, 512, 256, 1)[0], stack("q6_k", 8, 256, 256, 2)[0]
    x, logits = torch.randn(2, 256), torch.randn(2, 8)
    graph = ops.CpuGraph()
    with graph.capture():
        ids, weights = moe_route(logits, 3, normalize=True)
        out = moe_mlp(x, ids, weights, [gate_up], down, num_experts=8)
    for _ in range(3):
        logits.copy_(torch.randn(2, 8))
        graph.replay()
        chosen = moe_route(logits, 3, normalize=True)
        assert torch.equal(out, moe_mlp(x, *chosen, [gate_up], down, num_experts=8))


def test_what_does_not_fit_is_refused():
    gate_up, down = stack("f32", 4, 32, 64, 1)[0], stack("f32", 4, 64, 16, 2)[0]
    x, ids, weights = torch.randn(3, 64), torch.zeros(3, 1).int(), torch.ones(3, 1)
    with pytest.raises(ValueError, match="multiple of 16"):
        moe_mlp(x, ids, weights, [gate_up], down, num_experts=16)
    with pytest.raises(ValueError, match="do not fit"):
        moe_mlp(torch.randn(3, 32), ids, weights, [gate_up], down, num_experts=4)
    with pytest.raises(ValueError, match="ids"):
        moe_mlp(x, ids.long(), weights, [gate_up], down, num_experts=4)
    with pytest.raises(ValueError, match="top_k 5 of 4"):
        moe_route(torch.randn(3, 4), 5, normalize=True)
