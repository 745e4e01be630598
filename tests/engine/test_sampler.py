"""Sampling: parameters, filters against a plain float64 reference, distribution, determinism."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa.engine import sampler as sampler_module
from helexa.engine.sampler import Sampler, SamplingDefaults, SamplingParams, uniform
from helexa.errors import DeviceError, InvalidFile, InvalidParameter


def _sampler(prompt=(), **params):
    return Sampler(SamplingParams(**params).resolve(), list(prompt))


def _row(values):
    return torch.tensor(values, dtype=torch.float32)


def _support(logits, draws=400, **params):
    """The tokens that sampling at high randomness ever chooses."""
    return {_sampler(seed=seed, **params).sample(_row(logits), 0).token_id for seed in range(draws)}


# Parameters


def test_a_request_wins_over_the_generation_config_and_that_over_the_defaults():
    config = SamplingDefaults(temperature=0.6, top_k=20)
    resolved = SamplingParams(temperature=0.0, seed=3, stop=("x",)).resolve(config)
    assert (resolved.temperature, resolved.top_k, resolved.top_p) == (0.0, 20, 1.0)
    assert (resolved.seed, resolved.stop) == (3, ("x",))
    assert SamplingParams().resolve().temperature == 1.0


def test_the_recommendations_of_a_gguf_file_are_the_generation_config():
    metadata = {
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
        "general.sampling.penalty_repeat": 1.1,
    }
    defaults = SamplingDefaults.from_gguf(metadata)
    assert defaults == SamplingDefaults(temperature=0.6, top_k=20, repetition_penalty=1.1)
    assert SamplingDefaults.from_gguf({}) == SamplingDefaults()


def test_an_absurd_recommendation_of_a_file_is_refused_by_name():
    with pytest.raises(InvalidFile, match="temperature is -3"):
        SamplingDefaults.from_gguf({"general.sampling.temp": -3.0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 1.01),
        ("top_p", -0.01),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 2),
        ("typical_p", 0),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-300),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {"5": 0.0}),
        ("logit_bias", {5: 101}),
        ("seed", 2**64),
        ("seed", "lucky"),
        ("logprobs", 21),
        ("logprobs", -1),
        ("max_tokens", 0),
        ("stop", ("",)),
        ("stop_token_ids", (-1,)),
    ],
)
def test_a_value_out_of_range_is_refused_and_the_field_named(name, value):
    with pytest.raises(InvalidParameter, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def test_values_at_the_ends_of_their_ranges_are_accepted():
    SamplingParams(temperature=0, top_p=0, top_k=-1, min_p=1, typical_p=1, presence_penalty=-2, seed=-(2**63))
    SamplingParams(
        top_p=1, top_k=0, frequency_penalty=2, logit_bias={0: -100, 7: 100}, seed=2**64 - 1, logprobs=20
    )


def test_tokens_beyond_the_vocabulary_are_refused_by_name():
    with pytest.raises(InvalidParameter, match="logit_bias names token 10"):
        SamplingParams(logit_bias={10: 1.0}).check_vocabulary(10)
    with pytest.raises(InvalidParameter, match="stop_token_ids names token 12"):
        SamplingParams(stop_token_ids=(12,)).check_vocabulary(10)
    SamplingParams(logit_bias={9: 1.0}, stop_token_ids=(0,)).check_vocabulary(10)


# Greedy


def test_temperature_zero_takes_the_largest_logit_and_of_equals_the_first():
    assert _sampler(temperature=0).sample(_row([0.0, 3.0, 3.0, 1.0]), 0).token_id == 1


@pytest.mark.parametrize("temperature", [1e-30, 1e-6])
def test_a_vanishing_temperature_is_greedy_and_not_a_division_by_zero(temperature):
    assert _sampler(temperature=temperature).sample(_row([0.0, 3.0, 2.9999]), 0).token_id == 1


def test_temperature_zero_still_applies_bias_and_penalties_when_asked():
    logits = _row([5.0, 4.0, 3.0])
    assert _sampler(temperature=0, logit_bias={2: 10}).sample(logits, 0).token_id == 2
    assert _sampler([0], temperature=0, repetition_penalty=2.0).sample(logits, 0).token_id == 1
    sampler = _sampler(temperature=0, presence_penalty=1.5)
    assert [sampler.sample(logits, position).token_id for position in range(3)] == [0, 1, 0]


def test_the_logits_are_never_modified():
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    sampler = _sampler(
        range(50), temperature=0.7, top_p=0.9, top_k=20, repetition_penalty=1.2, logit_bias={3: 5}, logprobs=3
    )
    for position in range(5):
        sampler.sample(logits, position)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_of_the_device(bad, temperature):
    with pytest.raises(DeviceError, match="position 7 are not finite"):
        _sampler(temperature=temperature).sample(_row([0.0, bad, 1.0]), 7)
    with pytest.raises(DeviceError, match="not finite"):
        _sampler(temperature=temperature).sample(_row([-math.inf, -math.inf]), 7)


def test_a_token_at_minus_infinity_is_never_chosen():
    assert _support([0.0, -math.inf, 0.0], temperature=100) == {0, 2}


# Penalties


def _penalized(prompt, generated, logits, **params):
    """Penalties as their sources define them, token by token."""
    repetition, presence = params.get("repetition_penalty", 1.0), params.get("presence_penalty", 0.0)
    frequency = params.get("frequency_penalty", 0.0)
    scores = np.asarray(logits, np.float64).copy()
    for token in set(prompt) | set(generated):
        scores[token] = scores[token] * repetition if scores[token] < 0 else scores[token] / repetition
    for token in set(generated):
        scores[token] -= presence + frequency * generated.count(token)
    return scores


@given(
    prompt=st.lists(st.integers(0, 9), max_size=12),
    rows=st.lists(st.lists(st.floats(-8, 8, width=16), min_size=10, max_size=10), min_size=1, max_size=12),
    repetition=st.sampled_from([1.0, 0.5, 1.5]),
    presence=st.sampled_from([0.0, 1.0, -1.0]),
    frequency=st.sampled_from([0.0, 0.5]),
)
def test_penalties_follow_their_formulas_over_a_whole_sequence(prompt, rows, repetition, presence, frequency):
    params = {"repetition_penalty": repetition, "presence_penalty": presence, "frequency_penalty": frequency}
    sampler, generated = _sampler(prompt, temperature=0, **params), []
    for position, row in enumerate(rows):
        expected = _penalized(prompt, generated, row, **params)
        token = sampler.sample(_row(row), position).token_id
        assert expected[token] >= expected.max() - 1e-4
        generated.append(token)


def test_penalties_count_right_over_thousands_of_distinct_tokens():
    sampler = _sampler(temperature=0, presence_penalty=2.0)
    logits = torch.zeros(1500)
    assert [sampler.sample(logits, position).token_id for position in range(1500)] == list(range(1500))


# Filters against plain references


def _nucleus_reference(weights, top_p):
    order = sorted(range(len(weights)), key=lambda index: (-weights[index], index))
    total, held, kept = math.fsum(weights), 0.0, []
    for index in order:
        kept.append(index)
        held += weights[index]
        if held >= top_p * total:
            break
    return sorted(kept)


def _weights(seed, size, scale):
    gaps = np.abs(np.random.default_rng(seed).standard_normal(size)) * scale
    return np.exp(-(gaps - gaps.min())).astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 63, 1000, 30_011])
@pytest.mark.parametrize("scale", [0.0, 0.5, 5.0, 200.0])
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_is_the_smallest_set_that_holds_the_mass(size, scale, top_p):
    weights = _weights(size, size, scale)
    kept = sampler_module.nucleus(weights, top_p)
    expected = _nucleus_reference([float(weight) for weight in weights], top_p)
    if scale:
        assert kept.tolist() == expected
    else:  # all weights equal: rounding may move the border by one
        assert abs(len(kept) - len(expected)) <= 1
        assert kept.tolist() == list(range(len(kept)))


@given(
    weights=st.lists(st.integers(0, 64), min_size=1, max_size=50).filter(any),
    share=st.integers(1, 63),
)
def test_the_nucleus_is_exact_where_the_sums_are(weights, share):
    exact = np.array(weights, np.float32)
    assert sampler_module.nucleus(exact, share / 64).tolist() == _nucleus_reference(weights, share / 64)


@given(
    gaps=st.lists(st.floats(0, 10, width=16), min_size=1, max_size=700),
    count=st.integers(1, 40),
    repeats=st.sampled_from([1, 9]),
)
def test_the_nearest_are_the_first_of_a_stable_sort(gaps, count, repeats):
    array = np.tile(np.array(gaps, np.float32), repeats) + 0.0
    count = min(count, array.size)
    expected = np.sort(np.argsort(array, kind="stable")[:count])
    assert sampler_module.nearest(array, count).tolist() == expected.tolist()


@given(
    weights=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60).filter(any),
    mass=st.floats(0.01, 0.99),
)
def test_typical_sampling_keeps_the_least_strange_tokens_that_hold_the_mass(weights, mass):
    array = np.array(weights, np.float32)
    kept = set(sampler_module.typical(array, mass).tolist())
    total = array.astype(np.float64).sum()
    probabilities = {i: float(w) / total for i, w in enumerate(array) if w > 0}
    entropy = -math.fsum(p * math.log(p) for p in probabilities.values())
    strangeness = {i: abs(-math.log(p) - entropy) for i, p in probabilities.items()}
    tolerance = 1e-4 * (1 + max(strangeness.values()))
    assert kept
    assert kept <= probabilities.keys()
    assert math.fsum(probabilities[i] for i in kept) >= mass - 1e-6
    worst = max(kept, key=lambda i: strangeness[i])
    assert all(strangeness[i] >= strangeness[worst] - tolerance for i in probabilities.keys() - kept)
    nearly = [i for i in kept if strangeness[i] >= strangeness[worst] - tolerance]
    assert any(math.fsum(probabilities[j] for j in kept - {i}) < mass + 1e-6 for i in nearly)


@given(
    weights=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=80).filter(any),
    random=st.floats(0, 1, exclude_max=True),
    repeats=st.sampled_from([1, 40]),
)
def test_inversion_finds_the_token_at_which_the_sum_passes_the_random_number(weights, random, repeats):
    array = np.tile(np.array(weights, np.float32), repeats)
    index = sampler_module.invert(array, random)
    exact = np.concatenate([[0.0], np.cumsum(array.astype(np.float64))])
    slack = 1e-9 * exact[-1]
    assert array[index] > 0
    assert exact[index] - slack <= random * exact[-1] <= exact[index + 1] + slack


def test_top_k_one_and_top_p_zero_are_greedy():
    logits = [1.0, 2.0, 1.9]
    assert _support(logits, temperature=100, top_k=1) == {1}
    assert _support(logits, temperature=100, top_p=0) == {1}
    assert _support(logits, temperature=100, min_p=1) == {1}


def test_each_filter_cuts_off_the_tail_and_nothing_else():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert _support(logits) == {0, 1, 2, 3}
    assert _support(logits, top_k=2) == {0, 1}
    assert _support(logits, top_k=-1) == {0, 1, 2, 3}
    assert _support(logits, top_k=100) == {0, 1, 2, 3}
    assert _support(logits, top_p=0.65) == {0, 1}
    assert _support(logits, top_p=0.75) == {0, 1, 2}
    assert _support(logits, min_p=0.4) == {0, 1, 2}
    assert _support(logits, typical_p=0.3) == {1}


def test_top_p_sees_only_what_top_k_has_left():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert _support(logits, top_k=2, top_p=0.57) == {0}  # 0.4 / 0.7 = 0.571
    assert _support(logits, top_k=2, top_p=0.58) == {0, 1}


def test_filters_act_after_temperature():
    logits = np.log([0.6, 0.4])
    assert _support(logits, top_p=0.6 - 1e-6) == {0}
    assert _support(logits, top_p=0.6 - 1e-6, temperature=2.0) == {0, 1}


# Distribution and determinism


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7}, {"top_k": 3}, {"logit_bias": {4: 1.0}}])
def test_tokens_come_with_the_frequencies_of_the_distribution(params):
    logits, draws = np.array([0.0, 1.0, -1.0, 0.5, -0.5]), 20_000
    sampler = _sampler(seed=11, **params)
    counts = np.bincount([sampler.sample(_row(logits), i).token_id for i in range(draws)], minlength=5)
    scores = logits.copy()
    for token, bias in params.get("logit_bias", {}).items():
        scores[token] += bias
    expected = np.exp(scores / params.get("temperature", 1.0))
    if "top_k" in params:
        expected[np.argsort(-expected)[params["top_k"] :]] = 0
    expected *= draws / expected.sum()
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 18.5  # 0.1 per cent for four degrees of freedom


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others():
    rows = torch.randn(64, 500, generator=torch.Generator().manual_seed(1))

    def run(seed):
        sampler = _sampler(seed=seed)
        return [sampler.sample(row, position).token_id for position, row in enumerate(rows)]

    assert run(5) == run(5)
    assert run(5) != run(6)
    assert run(-1) == run(2**64 - 1)


def test_without_a_seed_every_request_is_drawn_afresh():
    rows = torch.zeros(32, 500)
    runs = [[s.sample(row, i).token_id for i, row in enumerate(rows)] for s in (_sampler(), _sampler())]
    assert runs[0] != runs[1]


def test_a_choice_depends_on_its_position_and_not_on_the_choices_before_it():
    logits = torch.randn(500, generator=torch.Generator().manual_seed(2))
    used = _sampler(seed=9)
    for position in range(20):
        used.sample(logits, position)
    assert used.sample(logits, 20) == _sampler(seed=9).sample(logits, 20)


def test_random_numbers_are_uniform_and_pinned():
    values = np.array([uniform(seed, position) for seed in range(40) for position in range(250)])
    assert values.min() >= 0
    assert values.max() < 1
    counts = np.histogram(values, 20, (0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 43.8  # 0.1 per cent for nineteen degrees of freedom
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.04
    assert [uniform(0, 0), uniform(0, 1), uniform(1, 0)] == [
        0.6524484863740322,
        0.7012121095215252,
        0.36818951565166946,
    ]


# Logprobs


def test_logprobs_are_those_of_the_model_before_temperature_and_penalties():
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(3)) * 3
    expected = torch.log_softmax(logits.double(), 0)
    for params in (
        {"temperature": 0},
        {"temperature": 3.0, "top_k": 50, "logit_bias": {7: 20.0}, "presence_penalty": 1},
    ):
        sampled = _sampler(seed=1, logprobs=5, **params).sample(logits, 0)
        best = torch.topk(expected, 5)
        assert [token for token, _ in sampled.top] == best.indices.tolist()
        np.testing.assert_allclose([value for _, value in sampled.top], best.values.numpy(), atol=1e-5)
        assert sampled.logprob == pytest.approx(expected[sampled.token_id].item(), abs=1e-5)


def test_logprobs_zero_reports_the_chosen_token_alone_and_none_reports_nothing():
    sampled = _sampler(temperature=0, logprobs=0).sample(_row([0.0, 0.0]), 0)
    assert (sampled.logprob, sampled.top) == (pytest.approx(-math.log(2)), [])
    assert _sampler(temperature=0).sample(_row([0.0, 0.0]), 0).logprob is None


def test_an_impossible_alternative_has_a_logprob_that_json_can_carry():
    sampled = _sampler(temperature=0, logprobs=3).sample(_row([0.0, -math.inf]), 0)
    assert sampled.top == [(0, 0.0), (1, -9999.0)]


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0, 1, 5, 0x1FFFF, 0x20000, 0x7F7FFFFF]), st.integers(0, 9)), min_size=1
    ),
    share=st.floats(0.01, 1.0),
)
def test_the_fewest_are_those_of_a_full_sort(rows, share):
    rows.append((5, 1))
    keys = np.array([key for key, _ in rows], np.uint32)
    masses = np.array([mass for _, mass in rows], np.float64)
    target = share * masses.sum()
    order = np.lexsort((np.arange(len(rows)), keys))
    count = min(int(np.searchsorted(masses[order].cumsum(), target)) + 1, len(rows))
    assert sampler_module.fewest(keys, masses, target).tolist() == sorted(order[:count].tolist())


@settings(max_examples=300)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32) | st.just(-math.inf), min_size=1, max_size=20).filter(
        lambda row: max(row) > -math.inf
    ),
    params=st.fixed_dictionaries(
        {"seed": st.integers(0, 99)},
        optional={
            "temperature": st.floats(0, 100),
            "top_p": st.floats(0, 1),
            "min_p": st.floats(0, 1),
            "typical_p": st.floats(0, 1, exclude_min=True),
            "top_k": st.integers(-1, 30),
            "repetition_penalty": st.floats(0.01, 100),
            "presence_penalty": st.floats(-2, 2),
            "frequency_penalty": st.floats(-2, 2),
            "logprobs": st.integers(0, 20),
        },
    ),
)
def test_whatever_the_parameters_a_possible_token_is_chosen(logits, params):
    row = _row(logits)
    sampler = _sampler(range(len(logits)), **params)
    for position in range(3):
        sampled = sampler.sample(row, position)
        assert logits[sampled.token_id] > -math.inf
        assert sampled.logprob is None or sampled.logprob <= 0
