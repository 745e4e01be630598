"""Rotary frequencies against the formulas of their papers, written out one by one."""

import math

import pytest
import torch

from helexa.errors import InvalidFile
from helexa.layers.linear import Scope
from helexa.layers.rotary import RopeScaling, RotaryEmbedding, inverse_frequencies


def plain(size, theta=10000.0):
    return [theta ** (-2 * i / size) for i in range(size // 2)]


def assert_frequencies(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=0)


def test_frequencies_fall_from_one_radian_per_position():
    inv_freq, magnitude = inverse_frequencies(64, 10000.0, None, None)
    assert_frequencies(inv_freq, plain(64))
    assert magnitude == 1.0


def test_linear_scaling_slows_every_frequency():
    inv_freq, magnitude = inverse_frequencies(64, 10000.0, RopeScaling("linear", 4.0), None)
    assert_frequencies(inv_freq, [f / 4 for f in plain(64)])
    assert magnitude == 1.0


def test_frequency_factors_divide():
    factors = torch.tensor([1.0, 2.0, 4.0, 8.0])
    inv_freq, _ = inverse_frequencies(8, 10000.0, None, factors)
    assert_frequencies(inv_freq, [f / d for f, d in zip(plain(8), (1, 2, 4, 8), strict=True)])


def test_yarn_keeps_fast_frequencies_slows_slow_ones_and_blends_between():
    size, theta, context, factor = 128, 1e6, 32768, 4.0
    scaling = RopeScaling("yarn", factor, 1.25, context)
    inv_freq, magnitude = inverse_frequencies(size, theta, scaling, None)
    # The index at which a frequency makes that many turns within the original context.
    low, high = (
        size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32.0, 1.0)
    )
    low, high = math.floor(low), math.ceil(high)
    expected = []
    for i, frequency in enumerate(plain(size, theta)):
        slowed = min(max((i - low) / (high - low), 0), 1)
        expected.append(frequency * (1 - slowed) + frequency / factor * slowed)
    assert_frequencies(inv_freq, expected)
    assert magnitude == 1.25
    assert expected[low] == plain(size, theta)[low]
    assert expected[-1] == pytest.approx(plain(size, theta)[-1] / factor)


def test_a_yarn_ramp_of_no_width_is_a_step():
    scaling = RopeScaling("yarn", 2.0, 1.0, 64, beta_fast=1e-6, beta_slow=1e-6)  # all turn faster than that
    inv_freq, _ = inverse_frequencies(16, 10000.0, scaling, None)
    assert bool(inv_freq.isfinite().all())


class Factors(dict):
    def vector(self, name):
        return self[name]


def test_factors_that_are_not_positive_are_refused():
    scope = Scope(Factors({"rope_freqs.weight": torch.tensor([1.0, 0.0])}), {"rope_factors": "rope_freqs"})
    with pytest.raises(InvalidFile, match=r"'rope_freqs\.weight' has 0 among its values, expected positive"):
        RotaryEmbedding.load(scope, 4, 10000.0, None)


def test_the_table_holds_cosine_and_sine_times_the_magnitude():
    rotary = RotaryEmbedding(8, 10000.0, RopeScaling("linear", 2.0, attention_factor=1.5))
    positions = torch.tensor([0, 3, 1000], dtype=torch.int32)
    angles = positions.double()[:, None] * torch.tensor(plain(8), dtype=torch.float64) / 2
    expected = 1.5 * torch.stack([angles.cos(), angles.sin()], dim=-1)
    torch.testing.assert_close(rotary(positions), expected.float(), rtol=0, atol=1e-4)
