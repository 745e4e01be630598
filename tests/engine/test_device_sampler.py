"""The choice on a device against the host's Sampler: the same tokens from the same parameters and seeds."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helexa import ops
from helexa.engine import Engine
from helexa.engine.device_sampler import DeviceSampler, device_sampler_nbytes, is_greedy
from helexa.engine.sampler import Sampler, SamplingParams
from helexa.errors import DeviceError

pytestmark = pytest.mark.cuda

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen3.gguf"
NUM_SLOTS = 5


class Bench:
    """A device's sampler whose logits come from the test."""

    def __init__(self, vocab_size, device, max_rows=NUM_SLOTS):
        self.device = torch.device(device)
        self.vocab_size = vocab_size
        self.chooser = DeviceSampler(vocab_size, NUM_SLOTS, max_rows, self.device)

    def bind(self, slot, sampler, prompt=(), generated=()):
        self.chooser.bind(slot, sampler, [*prompt, *generated], len(prompt))

    def launch(self, rows, slots, positions, **options):
        """The records of a launch for rows of logits on the host; `positions` are those of the new tokens."""
        integers = [
            torch.tensor(values, dtype=torch.int32, device=self.device) for values in (slots, positions)
        ]
        logits = torch.stack(list(rows)).to(self.device)
        self.chooser.launch(logits, integers[0], integers[1] - 1, **options)
        return self.chooser.records.cpu().numpy()

    def token(self, row, position, slot=1):
        found = self.chooser.read(self.launch([row], [slot], [position]), 0, slot)
        assert int(self.chooser.last_tokens[slot]) == found[0]
        return found


def _sampler(prompt=(), **params):
    return Sampler(SamplingParams(**params).resolve(), list(prompt))


def _logits(size, scale=3.0, seed=0):
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def bench(cuda_device):
    return lambda vocab_size, **options: Bench(vocab_size, cuda_device, **options)


def _choices(bench, vocab_size, draws, *, scale=3.0, **params):
    """Tokens of the host and of the device for the same seeds and logits."""
    device, pairs = bench(vocab_size), []
    for seed in range(draws):
        row = _logits(vocab_size, scale, seed)
        sampler = _sampler(seed=seed * 7919 - 3, **params)
        device.bind(1, sampler)
        pairs.append((sampler.sample(row, seed).token_id, device.token(row, seed)[0]))
    return pairs


# 2048 tokens are a chunk; of more than 4096 candidates none are gathered.
@pytest.mark.parametrize("vocab_size", [1, 2, 31, 1000, 2048, 5003])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.5, "min_p": 0.05},
        {"temperature": 1.2, "top_k": 50},
        {"temperature": 1.0, "typical_p": 0.6},
        {"temperature": 0.9, "top_k": 300, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9},
    ],
    ids=lambda params: "-".join(params),
)
def test_host_and_device_choose_the_same_tokens(bench, vocab_size, params):
    pairs = _choices(bench, vocab_size, 6, **params)
    assert [device for _, device in pairs] == [host for host, _ in pairs]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0, "top_p": 0.97},
        {"temperature": 50.0, "top_k": 5000, "top_p": 0.9},
        {"temperature": 100.0, "min_p": 0.5},
        {"temperature": 2.0, "typical_p": 0.95},
    ],
    ids=lambda params: "-".join(params),
)
def test_flat_distributions_with_more_candidates_than_are_gathered_are_exact_too(bench, params):
    pairs = _choices(bench, 9001, 4, scale=0.3, **params)
    assert [device for _, device in pairs] == [host for host, _ in pairs]


@pytest.mark.parametrize("top_k", [1, 3, 7, 64])
@pytest.mark.parametrize("vocab_size", [64, 5003])
def test_of_equal_logits_the_lower_tokens_are_kept(bench, vocab_size, top_k):
    row = torch.zeros(vocab_size)
    row[10] = -1.0
    device = bench(vocab_size)
    for seed in range(5):
        sampler = _sampler(temperature=1.0, top_k=top_k, seed=seed)
        device.bind(1, sampler)
        token = device.token(row, 0)[0]
        assert token == sampler.sample(row, 0).token_id
        assert token <= top_k
        assert token != 10


@pytest.mark.parametrize("top_p", [0.0, 0.25, 0.5])
def test_a_nucleus_of_equal_weights_ends_at_the_same_token(bench, top_p):
    row, device = torch.zeros(4096), bench(4096)
    seen = set()
    for seed in range(12):
        sampler = _sampler(temperature=1.0, top_p=top_p, seed=seed)
        device.bind(1, sampler)
        token = device.token(row, 5)[0]
        assert token == sampler.sample(row, 5).token_id
        seen.add(token)
    assert max(seen) < max(1, 4096 * top_p)


def test_temperature_zero_takes_the_first_of_the_largest(bench):
    row = torch.zeros(3000)
    row[[2500, 2100]] = 2.0
    row[5] = -0.0
    device = bench(3000)
    device.bind(1, _sampler(temperature=0))
    assert device.token(row, 0)[0] == 2100
    assert device.token(torch.tensor([-0.0, 0.0]).repeat(1500), 0)[0] == 0


def test_a_draw_follows_the_distribution(bench):
    row = torch.tensor([0.0, 1.0, 2.0, -math.inf, 3.0])
    device, counts = bench(5), np.zeros(5)
    device.bind(1, _sampler(temperature=1.0, seed=3))
    for position in range(600):
        counts[device.token(row, position)[0]] += 1
    assert counts[3] == 0
    assert np.abs(counts / 600 - row.softmax(0).numpy()).max() < 0.06


def test_penalties_and_bias_follow_the_host_over_a_whole_sequence(bench):
    prompt = [3, 3, 7, 90]
    params = {
        "temperature": 0.8,
        "seed": 11,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.31,
        "logit_bias": {5: 4.0, 7: -100.0, 99: 2.5},
    }
    sampler, device = _sampler(prompt, **params), bench(100)
    device.bind(2, sampler, prompt)
    generated = []
    for position in range(4, 60):
        row = _logits(100, 1.0, position)
        token = sampler.sample(row, position).token_id
        assert device.token(row, position, slot=2)[0] == token
        generated.append(token)
    assert len(set(generated)) > 10
    # Bound again behind what was generated, as after a preemption.
    device.bind(3, sampler, prompt, generated)
    row = _logits(100, 1.0, 60)
    assert device.token(row, 60, slot=3)[0] == sampler.sample(row, 60).token_id


def test_presence_penalties_do_not_count_the_prompt(bench):
    row = torch.tensor([5.0, 4.5, 0.0])
    device = bench(3)
    device.bind(1, _sampler([0], temperature=0, presence_penalty=1.0), [0])
    assert [device.token(row, position)[0] for position in range(1, 4)] == [0, 1, 0]


def test_a_slot_that_is_bound_again_forgets_what_it_had(bench):
    row = torch.tensor([5.0, 4.5, 0.0])
    device = bench(3)
    device.bind(1, _sampler(temperature=0, presence_penalty=2.0, logit_bias={2: 100.0}))
    device.chooser.allow(1, 1)
    assert device.token(row, 0)[0] == 1
    device.bind(1, _sampler(temperature=0, presence_penalty=0.1))
    assert [device.token(row, position)[0] for position in range(2)] == [0, 0]
    device.bind(1, _sampler(temperature=0))
    assert device.token(row, 0)[0] == 0


def test_what_is_not_allowed_is_never_chosen(bench):
    vocab_size = 2500
    row = _logits(vocab_size)
    device = bench(vocab_size)
    allowed = np.zeros(2471, np.bool_)  # models may have more rows than their vocabulary has tokens
    allowed[[0, 31, 32, 2048, 2470]] = True
    row[2490] = 100.0
    for seed in range(10):
        device.bind(1, _sampler(temperature=5.0, seed=seed, top_k=2))
        device.chooser.allow(1, allowed)
        best = sorted(np.flatnonzero(allowed), key=lambda token: -float(row[token]))[:2]
        assert device.token(row, 0)[0] in best
    device.chooser.allow(1, 17)
    assert device.token(row, 0)[0] == 17
    device.chooser.allow(1, None)
    assert device.token(row, 0)[0] == 2490


def test_rows_of_one_launch_are_chosen_as_each_alone(bench):
    vocab_size = 4500
    device = bench(vocab_size)
    every = [
        {"temperature": 0},
        {"temperature": 1.0, "top_p": 0.9, "logprobs": 3},
        {"temperature": 0.6, "top_k": 20},
        {"temperature": 1.0},
    ]
    rows = [_logits(vocab_size, 2.0, seed) for seed in range(4)]
    samplers = [_sampler(seed=slot, **params) for slot, params in enumerate(every)]
    for slot, sampler in enumerate(samplers, start=1):
        device.bind(slot, sampler)
    alone = [device.token(row, 9, slot) for slot, row in enumerate(rows, start=1)]
    expected = [sampler.sample(row, 9).token_id for sampler, row in zip(samplers, rows, strict=True)]
    assert [found[0] for found in alone] == expected
    slots = [3, 0, 1, 4, 2]
    records = device.launch([rows[slot - 1] for slot in slots], slots, [9] * 5)
    for row, slot in enumerate(slots):
        if slot:
            assert device.chooser.read(records, row, slot) == alone[slot - 1]
    assert device.chooser.last_tokens[1:].tolist() == expected


def test_greedy_rows_alone_take_the_short_way(bench):
    vocab_size = 3000
    device, row = bench(vocab_size), _logits(vocab_size)
    device.bind(1, _sampler(temperature=0))
    records = device.launch([row], [1], [4], greedy_only=True)
    assert device.chooser.read(records, 0, 1) == (int(row.argmax()), None, [])
    assert is_greedy(SamplingParams(temperature=0).resolve())
    assert not is_greedy(SamplingParams(temperature=0, logprobs=0).resolve())
    assert not is_greedy(SamplingParams(temperature=0.5).resolve())


@pytest.mark.parametrize("vocab_size", [3, 2500, 5003])
@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_log_probabilities_are_those_of_the_host(bench, vocab_size, num_top):
    device, row = bench(vocab_size), _logits(vocab_size, 2.0)
    sampler = _sampler(temperature=0.7, seed=5, logprobs=num_top, logit_bias={1: 3.0})
    device.bind(1, sampler)
    expected = sampler.sample(row, 3)
    token, logprob, top = device.token(row, 3)
    assert token == expected.token_id
    assert logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert [index for index, _ in top] == [index for index, _ in expected.top]
    assert [value for _, value in top] == pytest.approx([value for _, value in expected.top], abs=1e-5)


def test_the_most_likely_of_equals_are_the_first(bench):
    device = bench(5003)
    device.bind(1, _sampler(temperature=0, logprobs=20))
    _, logprob, top = device.token(torch.zeros(5003), 0)
    assert [index for index, _ in top] == list(range(20))
    assert logprob == pytest.approx(-math.log(5003), abs=1e-5)


def test_what_a_grammar_excludes_is_no_alternative(bench):
    class Anything:
        """Stands for a guide."""

    device, row = bench(40), _logits(40)
    sampler = Sampler(SamplingParams(temperature=0, logprobs=5).resolve(), [], Anything())
    device.bind(1, sampler)
    allowed = np.zeros(40, np.bool_)
    allowed[[4, 9]] = True
    device.chooser.allow(1, allowed)
    token, logprob, top = device.token(row, 0)
    assert token in (4, 9)
    assert {index for index, _ in top} == {4, 9}
    assert sum(math.exp(value) for _, value in top) == pytest.approx(1.0, abs=1e-6)
    assert logprob == dict(top)[token]
    device.chooser.allow(1, 7)
    assert device.token(row, 0) == (7, 0.0, [])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 5, "logprobs": 2}])
def test_logits_that_are_not_finite_fail_their_row_alone(bench, bad, params):
    device, row = bench(2100), _logits(2100)
    for slot in (1, 2, 3):
        device.bind(slot, _sampler(**params))
    poisoned = row.clone()
    poisoned[2090] = bad
    nothing = torch.full((2100,), -math.inf)
    records = device.launch([poisoned, row, nothing], [1, 2, 3], [7, 7, 8])
    with pytest.raises(DeviceError, match=f"position 7 are not finite: the largest is {bad}"):
        device.chooser.read(records, 0, 1)
    assert device.chooser.read(records, 1, 2)[0] >= 0
    with pytest.raises(DeviceError, match="position 8 are not finite: the largest is -inf"):
        device.chooser.read(records, 2, 3)
    assert device.chooser.last_tokens[[1, 3]].tolist() == [0, 0]
    allowed = np.ones(2100, np.bool_)
    allowed[2090] = False
    device.chooser.allow(1, allowed)
    assert device.token(poisoned, 7)[0] != 2090  # what may not come does not matter


def test_a_replay_reads_logits_positions_and_parameters_anew(bench, cuda_device):
    device = bench(5003)
    if not device.chooser.last_tokens.is_cuda:
        pytest.skip("the host has no CUDA graphs")
    logits = torch.zeros(2, 5003, device=cuda_device)
    slots, positions = torch.zeros(2, 2, dtype=torch.int32, device=cuda_device)
    device.chooser.launch(logits, slots, positions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        device.chooser.launch(logits, slots, positions)
    for seed in range(20):
        every = [
            {"temperature": 0.8, "top_p": 0.9, "logprobs": 2},
            {"temperature": 1.0, "presence_penalty": 1.0},
        ]
        samplers = [_sampler(seed=seed + number, **params) for number, params in enumerate(every)]
        rows = [_logits(5003, 3.0, 2 * seed + number) for number in range(2)]
        slots.copy_(torch.tensor([3, 1]))
        positions.copy_(torch.tensor([seed, 5]))
        logits.copy_(torch.stack(rows))
        for slot, sampler in zip((3, 1), samplers, strict=True):
            device.bind(slot, sampler)
        graph.replay()
        records = device.chooser.records.cpu().numpy()
        for index, position in enumerate((seed + 1, 6)):
            found = device.chooser.read(records, index, (3, 1)[index])
            assert found[0] == samplers[index].sample(rows[index], position).token_id


async def test_vocabularies_that_are_too_large_for_a_device_are_left_to_the_host(cuda_device, monkeypatch):
    options = {"device": cuda_device, "kv_cache_tokens": 512, "num_threads": 1, "capture": False}
    params = SamplingParams(temperature=0.9, seed=5, max_tokens=8, ignore_eos=True)
    answers = []
    for _ in range(2):
        with Engine.load(GOLDEN, **options) as engine:
            deltas = [delta async for delta in engine.generate([1, 2, 3], params)]
        answers.append([token_id for delta in deltas for token_id in delta.token_ids])
        for module in ("helexa.ops", "helexa.ops.sample"):
            monkeypatch.setattr(sys.modules[module], "MAX_VOCABULARY", 16)
    assert answers[0] == answers[1]


def test_its_memory_is_known_before(cuda_device):
    chooser = DeviceSampler(1000, 3, 4, torch.device(cuda_device))
    for slot in range(3):
        chooser.bind(slot, _sampler(presence_penalty=1.0, logit_bias={0: 1.0}), [], 0)
    tensors = [value for value in vars(chooser).values() if isinstance(value, torch.Tensor)]
    tensors += [*chooser._counts.values(), *chooser._biases.values()]
    assert sum(tensor.nbytes for tensor in tensors) == device_sampler_nbytes(1000, 3, 4)


def test_tensors_that_do_not_fit_are_refused(bench):
    device = bench(10)
    one = torch.zeros(1, dtype=torch.int32, device=device.device)
    with pytest.raises(ValueError, match="sample: logits"):
        device.chooser.launch(torch.zeros(1, 10, device=device.device).double(), one, one)
    with pytest.raises(ValueError, match="sample: slots"):
        device.chooser.launch(torch.zeros(2, 10, device=device.device), one, one)
    with pytest.raises(ValueError, match="sample: masks"):
        device.chooser.launch(torch.zeros(1, 5000, device=device.device), one, one)
    many = torch.zeros(NUM_SLOTS + 1, dtype=torch.int32, device=device.device)
    with pytest.raises(ValueError, match="6 rows of 10 logits"):
        device.chooser.launch(torch.zeros(6, 10, device=device.device), many, many)
    assert device.chooser.serves(SamplingParams().resolve())
    assert not DeviceSampler.serves(type("Large", (), {"_vocab_size": ops.MAX_VOCABULARY + 1})(), None)
