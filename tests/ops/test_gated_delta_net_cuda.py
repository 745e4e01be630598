"""The CUDA kernels against the reference in float64: token by token, and in chunks with 11 bits."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from helexa import ops
from helexa.ops.gated_delta_net import gated_delta_net
from helexa.ops.tensor import EMULATED
from support.delta_nets import buffers, parameters, places, random_states, reference

pytestmark = pytest.mark.cuda

# Of sequences that go in chunks: queries, keys and operands of products have 11 bits; values of bfloat16
# input have 8.
CHUNKED, CHUNKED_BF16 = 2e-3, 6e-3


def run(p, x, lengths, states, *, starts=None, slots=None, out=None):
    """The op's float32 values for sequences of these lengths that stand at `starts`."""
    device = p.decay.device
    if out is None:
        out = ops.Activation(p.value_dim, x=torch.full((x.shape[0], p.value_dim), torch.nan, device=device))
    gated_delta_net(x, p, *states, *places(device, lengths, starts, slots), out=out)
    return out.values()


def check(assert_close, p, x, lengths, tolerance, **options):
    """Out and states against the reference's; a state begins with random numbers."""
    states = random_states(p, len(lengths))
    expected, expected_states = reference(p, x, lengths, states, **options)
    assert_close("out", expected, run(p, x, lengths, states, **options).cpu(), tolerance)
    assert_close("conv", expected_states[0], states[0].cpu(), 1e-6)
    assert_close("state", expected_states[1], states[1].cpu(), tolerance)


# --- token by token -----------------------------------------------------------------------------

SHAPES = ((1, 1, 16, 16), (2, 6, 32, 48), (2, 4, 128, 128), (1, 1, 256, 256), (1, 3, 80, 208))


@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("tiled", [False, True])
def test_few_tokens_of_several_sequences(cuda_device, heads, tiled, assert_close):
    p = parameters(heads, device=cuda_device, tiled=tiled)
    lengths = [1, 2, 3, 1, 9]
    x = torch.randn(sum(lengths), p.row).to(cuda_device)
    check(assert_close, p, x, lengths, 1e-5, starts=[5, 0, 1, 0, 0])


def test_a_long_sequence_of_a_shape_without_chunks(cuda_device, assert_close):
    p = parameters((1, 3, 32, 16), device=cuda_device)
    x = torch.randn(70, p.row).to(cuda_device)
    check(assert_close, p, x, [70], 1e-5, starts=[2])


@pytest.mark.parametrize("taps", [2, 3, 4, 7, 12])
@pytest.mark.parametrize("length", [1, 10])
def test_any_number_of_taps(cuda_device, taps, length, assert_close):
    p = parameters((1, 3, 16, 32), device=cuda_device, taps=taps)
    x = torch.randn(length, p.row).to(cuda_device)
    for start in (0, 3):
        check(assert_close, p, x, [length], 2e-5, starts=[start])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_tokens_below_a_chunk(cuda_device, dtype, assert_close):
    p = parameters((2, 4, 128, 128), device=cuda_device, tiled=True)
    lengths = [1, 15, 4, 8, 5, 12]
    x = torch.randn(sum(lengths), p.row).to(dtype).to(cuda_device)
    check(assert_close, p, x, lengths, 1e-5, starts=[3, 0, 1, 9, 0, 2])


def test_a_step_that_does_not_wait_for_settled_states_is_bit_for_bit_one_that_does(cuda_device):
    p = parameters((2, 6, 128, 128), device=cuda_device)
    waiting = random_states(p, 3)
    settled = [state.clone() for state in waiting]
    where = places(cuda_device, [1, 2, 1], [4, 7, 0], slots=[2, 0, 1])
    for _ in range(3):
        x = torch.randn(4, p.row).to(cuda_device)
        expected = gated_delta_net(x, p, *waiting, *where).values()
        out = gated_delta_net(x.clone(), p, *settled, *where, settled=True).values()
        assert torch.equal(out, expected)
    for state, wanted in zip(settled, waiting, strict=True):
        assert torch.equal(state, wanted)


def test_tokens_at_once_are_bit_for_bit_tokens_one_by_one_alone_and_in_company(cuda_device):
    p = parameters((1, 2, 128, 128), device=cuda_device)
    x = torch.randn(8, p.row).to(cuda_device)
    others = torch.randn(3, p.row).to(cuda_device)
    begin = random_states(p, 3)
    together, alone = [s.clone() for s in begin], [s.clone() for s in begin]
    out = run(p, torch.cat([others[:1], x, others[1:]]), [1, 8, 2], together, starts=[3, 4, 5])
    for t in range(8):
        one = run(p, x[t : t + 1], [1], alone, starts=[4 + t], slots=[1])
        assert torch.equal(out[1 + t], one[0])
    for state, wanted in zip(alone, together, strict=True):
        assert torch.equal(state[1], wanted[1])


def test_slots_are_those_asked_for_and_no_others_change(cuda_device):
    p = parameters((1, 2, 64, 32), device=cuda_device)
    x = torch.randn(41, p.row).to(cuda_device)
    states = random_states(p, 5)
    before = [state.clone() for state in states]
    run(p, x, [1, 40], states, starts=[4, 9], slots=[3, 1])
    for state, old in zip(states, before, strict=True):
        assert torch.equal(state[[0, 2, 4]], old[[0, 2, 4]])
        assert not torch.equal(state[3], old[3])
        assert not torch.equal(state[1], old[1])


@pytest.mark.parametrize("length", [1, 9, 40])
def test_a_sequence_that_begins_forgets_what_its_slot_held(cuda_device, length):
    p = parameters((1, 2, 64, 32), device=cuda_device)
    x = torch.randn(length, p.row).to(cuda_device)
    used, fresh = random_states(p, 1), buffers(p, 1)
    assert torch.equal(run(p, x, [length], fresh), run(p, x, [length], used))
    for state, wanted in zip(used, fresh, strict=True):
        assert torch.equal(state, wanted)


def test_rows_that_share_a_slot_and_a_sequence_without_tokens_leave_others_alone(cuda_device):
    """What fills up a captured batch: fresh sequences that all have slot 0."""
    p = parameters((2, 4, 32, 32), device=cuda_device)
    x = torch.randn(4, p.row).to(cuda_device)
    states, alone = random_states(p, 3), random_states(p, 3)
    for state, other in zip(states, alone, strict=True):
        other.copy_(state)
    out = run(p, x, [1, 1, 0, 1, 1], states, starts=[7, 0, 4, 0, 2], slots=[2, 0, 1, 0, 0])
    wanted = run(p, x[:1], [1], alone, starts=[7], slots=[2])
    assert torch.equal(out[:1], wanted)
    for state, other in zip(states, alone, strict=True):
        assert torch.equal(state[1:], other[1:])
    assert not p.counters(3).any()


# --- in chunks -----------------------------------------------------------------------------------

CHUNK_LENGTHS = (1, 16, 17, 63, 3, 64, 65, 128, 130)


@cache
def ragged_batch(heads, tiled, dtype):
    """Parameters, input, states before, and what the reference makes of sequences of CHUNK_LENGTHS."""
    torch.manual_seed(0)
    p = parameters(heads, tiled=tiled)
    x = torch.randn(sum(CHUNK_LENGTHS), p.row).to(dtype)
    starts = [0, 3, 0, 2, 0, 0, 5, 0, 1]
    states = random_states(p, len(CHUNK_LENGTHS))
    return p, x, starts, states, *reference(p, x, CHUNK_LENGTHS, states, starts=starts)


@pytest.mark.parametrize(
    ("heads", "tiled"), [((1, 2, 64, 32), False), ((2, 6, 64, 64), True), ((1, 2, 128, 128), False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ragged_batch_equals_the_reference(cuda_device, heads, tiled, dtype, assert_close):
    p, x, starts, states, expected, expected_states = ragged_batch(heads, tiled, dtype)
    p = on_device(p, cuda_device)
    states = [state.to(cuda_device) for state in states]
    out = run(p, x.to(cuda_device), CHUNK_LENGTHS, states, starts=starts).cpu()
    tolerance = CHUNKED if dtype == torch.float32 else CHUNKED_BF16
    first = 0
    for number, length in enumerate(CHUNK_LENGTHS):
        rows = slice(first, first + length)
        exact = length < 16
        assert_close(f"out {length}", expected[rows], out[rows], 1e-5 if exact else tolerance)
        state, wanted = states[1][number].cpu(), expected_states[1][number]
        assert_close(f"state {length}", wanted, state, 1e-5 if exact else tolerance)
        first += length
    assert_close("conv", expected_states[0], states[0].cpu(), 1e-6)


def on_device(p, device):
    names = ("conv_weight", "decay", "dt_bias", "norm_weight")
    return replace(p, **{name: getattr(p, name).to(device) for name in names})


@pytest.mark.parametrize("pieces", [[64, 1, 64], [3, 64, 10, 1, 1, 100], [16, 15, 17], [65, 65]])
def test_pieces_equal_the_whole(cuda_device, pieces, assert_close):
    p = parameters((1, 2, 64, 32), device=cuda_device)
    x = torch.randn(sum(pieces), p.row).to(cuda_device)
    expected, expected_states = reference(p, x, [sum(pieces)], buffers(p, 1))
    states, outs, start = buffers(p, 1), [], 0
    for count in pieces:
        outs.append(run(p, x[start : start + count].contiguous(), [count], states, starts=[start]))
        start += count
    assert_close("out", expected, torch.cat(outs).cpu(), CHUNKED)
    assert_close("state", expected_states[1], states[1].cpu(), CHUNKED)


@pytest.mark.parametrize("length", [1, 70, 200])
def test_hard_gates_stay_finite_and_exact(cuda_device, length, assert_close):
    """Decays of e^-300 a token, gates far beyond float32's softplus, betas of 0 and 1."""
    decay = torch.tensor([-16.0, -1e-8, -16.0, -1.0, 0.0, -4.0], device=cuda_device)
    p = replace(parameters((3, 6, 64, 32), device=cuda_device), decay=decay)
    x = torch.randn(length, p.row)
    x[:, -12:-6] = torch.tensor([60.0, -60.0, 0.0, 30.0, 30.0, 1.0])  # b
    x[:, -6:] = torch.tensor([100.0, -100.0, 20.0, 25.0, 0.0, -30.0])  # a
    check(assert_close, p, x.to(cuda_device), [length], 1e-5 if length < 16 else CHUNKED, starts=[1])


def test_a_state_is_forgotten_at_once_and_remembered_after(cuda_device, assert_close):
    """A token whose decay is e^-1600 amid some that hardly decay: sums of log decays keep the digits."""
    decay = torch.tensor([-16.0, -16.0], device=cuda_device)
    p = replace(parameters((1, 2, 64, 32), device=cuda_device), decay=decay, dt_bias=torch.zeros_like(decay))
    x = torch.randn(130, p.row)
    x[:, -2:] = -9.0
    x[70, -2:] = 100.0
    check(assert_close, p, x.to(cuda_device), [130], CHUNKED, starts=[1])


@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.1])
def test_keys_that_hardly_differ_with_beta_near_one(cuda_device, spread, assert_close):
    """The system that a chunk solves is then as badly conditioned as it gets."""
    decay = torch.tensor([-1e-4, -1e-4], device=cuda_device)
    p = replace(parameters((1, 2, 64, 32), device=cuda_device), decay=decay)
    x = torch.randn(1, p.row).repeat(192, 1) + spread * torch.randn(192, p.row)
    x[:, -4:-2] = 8.0
    expected, expected_states = reference(p, x, [192], buffers(p, 1))
    states = buffers(p, 1)
    assert_close("out", expected, run(p, x.to(cuda_device), [192], states).cpu(), 2 * CHUNKED)
    assert_close("state", expected_states[1], states[1].cpu(), 2 * CHUNKED)


def test_values_beyond_the_range_of_float16_are_no_matter(cuda_device, assert_close):
    p = parameters((1, 2, 128, 32), device=cuda_device)
    x = torch.randn(80, p.row)
    x[:, 2 * p.key_dim : 2 * p.key_dim + p.value_dim] *= 1e6
    check(assert_close, p, x.to(cuda_device), [80], CHUNKED)


def test_thousands_of_tokens_do_not_drift(cuda_device, assert_close):
    length = 384 if EMULATED else 4096
    decay = torch.tensor([-1e-3, -0.1], device=cuda_device)
    p = replace(parameters((1, 2, 64, 32), device=cuda_device), decay=decay)
    x = torch.randn(length, p.row).to(cuda_device)
    states = buffers(p, 1)
    expected, (_, expected_state) = reference(p, x, [length], states)
    out = run(p, x, [length], states).cpu()
    assert_close("the last tokens", expected[-64:], out[-64:], CHUNKED)
    assert_close("state", expected_state, states[1].cpu(), CHUNKED)


# --- forms, captures, refusals -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "heads"),
    [(3, (1, 3, 64, 32)), (16, (1, 2, 64, 32)), (5, (2, 6, 32, 16)), (9, (1, 2, 128, 128))],
)
def test_codes_are_those_of_the_values(cuda_device, length, heads):
    """Also of an odd number of blocks of 32 columns, and of heads that share a block."""
    p = parameters(heads, device=cuda_device)
    x = torch.randn(length, p.row).to(cuda_device)
    values = run(p, x, [length], buffers(p, 1))
    codes = gated_delta_net(x, p, *buffers(p, 1), *places(cuda_device, [length]))
    assert codes.q8 is not None
    assert torch.equal(codes.values(), ops.quantize_rows(values).values())


def test_many_rows_are_bfloat16(cuda_device):
    p = parameters((1, 2, 64, 32), device=cuda_device)
    x = torch.randn(65, p.row).to(cuda_device).bfloat16()
    values = run(p, x, [65], buffers(p, 1))
    rows = gated_delta_net(x, p, *buffers(p, 1), *places(cuda_device, [65]))
    assert rows.q8 is None
    assert torch.equal(rows.bf16, values.bfloat16())


def test_what_is_wrong_is_seen(cuda_device, assert_close):
    """A swapped head order, a state in bfloat16 and a border of zeros each fail these tests' tolerance."""
    p = parameters((2, 4, 64, 32), device=cuda_device)
    x = torch.randn(130, p.row).to(cuda_device)
    expected, _ = reference(p, x, [130], buffers(p, 1))
    swapped = run(replace(p, tiled=True), x, [130], buffers(p, 1)).cpu()
    with pytest.raises(AssertionError, match="order"):
        assert_close("order", expected, swapped, CHUNKED)
    states = buffers(p, 1)
    first = run(p, x[:65], [65], states)
    kept = [state.clone() for state in states]
    states[0].zero_()
    rest = run(p, x[65:].contiguous(), [65], states, starts=[65])
    with pytest.raises(AssertionError, match="border"):
        assert_close("border", expected, torch.cat([first, rest]).cpu(), CHUNKED)
    few, wanted = x[65:66].contiguous(), [state.clone() for state in kept]
    right = run(p, few, [1], wanted, starts=[65])
    kept[1].copy_(kept[1].bfloat16())
    with pytest.raises(AssertionError, match="bfloat16"):
        assert_close("bfloat16", right, run(p, few, [1], kept, starts=[65]), 1e-5)


@pytest.mark.skipif(EMULATED, reason="the host has no graphs")
@pytest.mark.parametrize("lengths", [[1, 1], [8], [20]])
def test_a_captured_step_equals_an_eager_one(cuda_device, lengths):
    p = parameters((1, 2, 128, 128), device=cuda_device)
    x = torch.randn(sum(lengths), p.row).to(cuda_device)
    where = places(cuda_device, lengths, [4] * len(lengths))
    states = random_states(p, len(lengths))
    eager_states = [state.clone() for state in states]
    expected = [gated_delta_net(x, p, *eager_states, *where).values() for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gated_delta_net(x, p, *states, *where)
    for wanted in expected:
        graph.replay()
        assert torch.equal(out.values(), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.float16}, "x is"),
        ({"states": torch.float16}, "states"),
        ({"out": (2, 64)}, "out is an Activation"),
        ({"out": (3, 65)}, "out is an Activation"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(cuda_device, change, message):
    p = parameters((1, 2, 64, 32), device=cuda_device)
    x = torch.randn(3, p.row).to(cuda_device).to(change.get("x", torch.float32))
    states = buffers(p, 1)
    states[1] = states[1].to(change.get("states", torch.float32))
    shape = change.get("out", (3, 64))
    out = ops.Activation(shape[1], x=torch.empty(shape, device=cuda_device))
    with pytest.raises(ValueError, match=message):
        gated_delta_net(x, p, *states, *places(cuda_device, [3]), out=out)
