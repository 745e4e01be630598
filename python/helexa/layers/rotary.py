"""Rotary position embedding: frequencies and their scaling to longer contexts.

Plain and linear scaling as in Su et al. 2021 and Chen et al. 2023; yarn as in Peng et al. 2023, with the
conventions of transformers' `modeling_rope_utils.py` and of the GGUF keys `rope.scaling.*`; frequency
factors as GGUF's tensor `rope_freqs.weight` (llama 3).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from helexa import ops
from helexa.errors import InvalidFile
from helexa.layers.linear import Scope


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched; the last four fields belong to yarn."""

    rope_type: str  # "linear" or "yarn"
    factor: float
    attention_factor: float = 1.0  # on cos and sin, so that it enters attention scores squared
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    extrapolation_factor: float = 1.0  # share of the ramp; 0 is plain linear scaling


class RotaryEmbedding:
    """The table of cos and sin, [T, rotary_dim / 2, 2], which all layers of a step share."""

    def __init__(
        self,
        rotary_dim: int,
        theta: float,
        scaling: RopeScaling | None = None,
        frequency_factors: Tensor | None = None,
    ):
        self.inv_freq, self.magnitude = inverse_frequencies(rotary_dim, theta, scaling, frequency_factors)

    @classmethod
    def load(
        cls, scope: Scope, rotary_dim: int, theta: float, scaling: RopeScaling | None
    ) -> "RotaryEmbedding":
        """With the file's frequency factors, if it has them."""
        factors = None
        if "rope_factors.weight" in scope:
            factors = scope.vector("rope_factors.weight", rotary_dim // 2).cpu()
            if not bool((factors > 0).all()):
                name = scope.file_name("rope_factors.weight")
                raise InvalidFile(
                    f"tensor {name!r} has {factors.min():g} among its values, expected positive ones"
                )
        return cls(rotary_dim, theta, scaling, factors)

    def __call__(self, positions: Tensor) -> Tensor:
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        return ops.rope_table(positions, self.inv_freq, self.magnitude)


def inverse_frequencies(
    rotary_dim: int, theta: float, scaling: RopeScaling | None, frequency_factors: Tensor | None
) -> tuple[Tensor, float]:
    """(radians per position, float32 [rotary_dim / 2]; factor on cos and sin)."""
    inv_freq = 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    if frequency_factors is not None:
        inv_freq = inv_freq / frequency_factors
    if scaling is None:
        return inv_freq, 1.0
    stretched = inv_freq / scaling.factor
    if scaling.rope_type == "linear":
        return stretched, scaling.attention_factor
    keep = scaling.extrapolation_factor * (1.0 - _yarn_ramp(rotary_dim, theta, scaling))
    return stretched * (1.0 - keep) + inv_freq * keep, scaling.attention_factor


def _yarn_ramp(rotary_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """0 for frequencies of more than beta_fast turns within the original context, 1 below beta_slow turns,
    linear between.
    """

    def index_of(turns: float) -> float:
        length = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return rotary_dim * math.log(length) / (2 * math.log(theta))

    low = max(math.floor(index_of(scaling.beta_fast)), 0)
    high = min(math.ceil(index_of(scaling.beta_slow)), rotary_dim - 1)
    index = torch.arange(rotary_dim // 2, dtype=torch.float32)
    return ((index - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
