"""The op against its reference in float64: odd head ratios, lengths around chunks, deltas that are hard."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from helexa import ops
from helexa.ops.gated_delta_net import gated_delta_net
from support.delta_nets import buffers, parameters, places, reference

LENGTHS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 130)
SHAPES = ((1, 1, 16, 16), (2, 6, 32, 48), (3, 3, 128, 128), (4, 8, 64, 32))  # H_k, H_v, d_k, d_v


def run(p, x, lengths, states, *, starts=None, slots=None):
    """The op for sequences of these lengths that stand at `starts`."""
    out = torch.full((x.shape[0], p.value_dim), torch.nan)
    gated_delta_net(x, p, *states, *places("cpu", lengths, starts, slots), out=out)
    return out


@cache
def ragged_batch(heads, tiled):
    """Parameters, input, and what the reference makes of sequences of LENGTHS."""
    torch.manual_seed(0)
    p = parameters(heads, tiled=tiled)
    x = torch.randn(sum(LENGTHS), p.row)
    return p, x, *reference(p, x, LENGTHS, buffers(p, len(LENGTHS)))


@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("tiled", [False, True])
def test_a_ragged_batch_equals_the_reference_on_every_instruction_set(isa, heads, tiled, assert_close):
    p, x, expected, expected_states = ragged_batch(heads, tiled)
    states = buffers(p, len(LENGTHS))
    assert_close("out", expected, run(p, x, LENGTHS, states), 1e-5)
    for name, state, wanted in zip(("conv", "state"), states, expected_states, strict=True):
        assert_close(name, wanted, state, 1e-5)


@pytest.mark.parametrize("taps", [2, 3, 4, 7])
def test_any_number_of_taps(taps, assert_close):
    p = parameters(taps=taps)
    x = torch.randn(70, p.row)
    assert_close("out", reference(p, x, [70], buffers(p, 1))[0], run(p, x, [70], buffers(p, 1)), 1e-5)


@pytest.mark.parametrize(
    "pieces", [[1] * 20, [64, 1, 64], [7] * 20, [3, 64, 10, 1, 1, 100], [63, 2], [65, 65]]
)
def test_pieces_equal_the_whole(pieces, assert_close):
    p = parameters()
    x = torch.randn(sum(pieces), p.row)
    whole_states, states = buffers(p, 1), buffers(p, 1)
    whole = run(p, x, [sum(pieces)], whole_states)
    outs, start = [], 0
    for count in pieces:
        outs.append(run(p, x[start : start + count], [count], states, starts=[start]))
        start += count
    assert_close("out", whole, torch.cat(outs), 1e-5)
    for state, wanted in zip(states, whole_states, strict=True):
        assert_close("state", wanted, state, 1e-5)


def test_a_sequence_that_begins_forgets_what_its_slot_held(assert_close):
    p = parameters()
    for length in (1, 9):
        x = torch.randn(length, p.row)
        used = [torch.randn(shape) for shape in p.state_shapes(1)]
        assert_close("out", run(p, x, [length], buffers(p, 1)), run(p, x, [length], used), 0)


def test_slots_are_those_asked_for_and_no_others_change():
    p = parameters()
    x = torch.randn(12, p.row)
    states = [torch.randn(shape) for shape in p.state_shapes(5)]
    before = [state.clone() for state in states]
    out = run(p, x, [1, 11], states, starts=[4, 9], slots=[3, 1])
    alone = [state.clone() for state in before]
    assert torch.equal(out[1:], run(p, x[1:], [11], alone, starts=[9], slots=[1]))
    for state, old in zip(states, before, strict=True):
        assert torch.equal(state[[0, 2, 4]], old[[0, 2, 4]])
        assert not torch.equal(state[3], old[3])


@pytest.mark.parametrize("length", [1, 70, 200])
def test_hard_gates_stay_finite_and_exact(length, assert_close):
    """Decays of e^-300 a token, gates far beyond float32's softplus, betas of 0 and 1."""
    p = replace(parameters(), decay=torch.tensor([-16.0, -1e-8, -16.0, -1.0, 0.0, -4.0]))
    x = torch.randn(length, p.row)
    heads = p.num_value_heads
    x[:, -2 * heads : -heads] = torch.tensor([60.0, -60.0, 0.0, 30.0, 30.0, 1.0])  # b
    x[:, -heads:] = torch.tensor([100.0, -100.0, 20.0, 25.0, 0.0, -30.0])  # a
    states = [torch.randn(shape) for shape in p.state_shapes(1)]
    expected, _ = reference(p, x, [length], states, starts=[1])
    assert_close("out", expected, run(p, x, [length], states, starts=[1]), 1e-5)


def test_keys_that_hardly_differ_with_beta_near_one(assert_close):
    """The system that a chunk solves is then as badly conditioned as it gets."""
    p = replace(parameters((1, 2, 64, 64)), decay=torch.tensor([-1e-4, -1e-4]))
    x = torch.randn(1, p.row).repeat(256, 1) + 1e-3 * torch.randn(256, p.row)
    x[:, -4:-2] = 8.0
    expected, _ = reference(p, x, [256], buffers(p, 1))
    assert_close("out", expected, run(p, x, [256], buffers(p, 1)), 1e-4)


def test_four_thousand_tokens_do_not_drift(assert_close):
    p = replace(parameters((1, 2, 32, 32)), decay=torch.tensor([-1e-3, -0.1]))
    x = torch.randn(4096, p.row)
    states = buffers(p, 1)
    expected, (_, expected_state) = reference(p, x, [4096], states)
    out = run(p, x, [4096], states)
    assert_close("the last tokens", expected[-64:], out[-64:], 1e-5)
    assert_close("state", expected_state, states[1], 1e-5)


def test_what_is_wrong_is_seen(assert_close):
    """A swapped head order, a state in bfloat16 and a border of zeros each fail these tests' tolerance."""
    p = parameters()
    x = torch.randn(130, p.row)
    right = run(p, x, [130], buffers(p, 1))
    with pytest.raises(AssertionError, match="order"):
        assert_close("order", right, run(replace(p, tiled=True), x, [130], buffers(p, 1)), 1e-5)
    states = buffers(p, 1)
    first = run(p, x[:65], [65], states)
    states[1].copy_(states[1].bfloat16())
    with pytest.raises(AssertionError, match="bfloat16"):
        assert_close("bfloat16", right, torch.cat([first, run(p, x[65:], [65], states, starts=[65])]), 1e-5)
    states = buffers(p, 1)
    run(p, x[:65], [65], states)
    states[0].zero_()
    with pytest.raises(AssertionError, match="border"):
        assert_close("border", right, torch.cat([first, run(p, x[65:], [65], states, starts=[65])]), 1e-5)


def test_a_captured_step_equals_an_eager_one():
    p = parameters()
    x, slots, starts = torch.randn(2, p.row), torch.tensor([1, 0]).int(), torch.tensor([0, 1, 2]).int()
    lengths = torch.tensor([5, 9]).int()
    states = [torch.randn(shape) for shape in p.state_shapes(2)]
    eager_states = [state.clone() for state in states]
    expected = [gated_delta_net(x, p, *eager_states, slots, starts, lengths) for _ in range(2)]
    graph = ops.CpuGraph()
    with graph.capture():
        out = gated_delta_net(x, p, *states, slots, starts, lengths)
    for wanted in expected:
        graph.replay()
        assert torch.equal(out, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": torch.zeros(5)}, "dt_bias"),
        ({"num_key_heads": 4}, "6 heads over 4"),
        ({"key_head_dim": 40}, "channels"),
        ({"norm_weight": torch.ones(47)}, "channels"),
        ({"conv_weight": torch.ones(1, 416)}, "taps"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(parameters(), **change)


def test_tensors_that_do_not_fit_are_refused():
    p = parameters()
    states = buffers(p, 1)
    with pytest.raises(ValueError, match="x "):
        run(p, torch.randn(3, p.row + 1), [3], states)
    with pytest.raises(ValueError, match="states"):
        run(p, torch.randn(3, p.row), [3], [states[0], states[1].half()])
