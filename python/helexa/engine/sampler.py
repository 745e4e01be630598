"""The choice of the next token from one row of logits.

The order is that of `transformers`: penalties and logit_bias on the logits, then temperature, top_k, top_p,
min_p and typical_p, each on what the one before it left. Random numbers are a pure function of seed and
position, and a token is drawn by inverting the cumulative distribution in order of token id, so a device
kernel can repeat it.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from helexa.engine.guide import Guide
from helexa.engine.sampling_params import ResolvedParams, SamplingDefaults, SamplingParams
from helexa.errors import DeviceError

__all__ = ["ResolvedParams", "Sampled", "Sampler", "SamplingDefaults", "SamplingParams", "uniform"]

GREEDY_BELOW = 1e-5  # lower temperatures are taken as 0: the softmax is a single token in float32

FLOOR = -9999.0  # stands for a log-probability of -inf, which JSON cannot carry
_BLOCK = 1024  # entries per block of the two-level cumulative sum
_GROUPS = 64  # a vocabulary is cut into this many interleaved rows to bound the k-th largest logit
_MASK = 2**64 - 1

FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token.

    Log-probabilities are the model's own, over the tokens that a grammar allows: before penalties, bias and
    temperature. A token that was never the model's choice has 0.
    """

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]]
    is_thinking: bool = False  # it belongs to the block in which the model thinks
    is_last: bool = False  # the grammar allows nothing after it


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, a function of nothing but seed and position (SplitMix64)."""
    state = _mix((seed + 0x9E3779B97F4A7C15) & _MASK)
    return (_mix((state + (position + 1) * 0x9E3779B97F4A7C15) & _MASK) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Sampler:
    """Chooses the tokens of one sequence; keeps what its penalties need to know about the tokens so far.

    Where a device chooses by the same parameters, `constrain` and `accept` are what is left to do here.
    """

    def __init__(self, params: ResolvedParams, prompt_token_ids: Sequence[int], guide: Guide | None = None):
        self.params = params
        self.guide = guide
        self.seed = (secrets.randbits(64) if params.seed is None else params.seed) & _MASK
        self._greedy = params.temperature < GREEDY_BELOW
        self._scratch: FloatArray = np.empty(0, np.float32)
        self._restricted: FloatArray = np.empty(0, np.float32)
        bias = params.logit_bias or {}
        self._bias_ids: IdArray = np.fromiter(bias.keys(), np.int64, len(bias))
        self._bias: FloatArray = np.fromiter(bias.values(), np.float32, len(bias))
        self._choice: int | npt.NDArray[np.bool_] | None = None
        self._history: _History | None = None
        if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
            self._history = _History(prompt_token_ids if params.repetition_penalty != 1.0 else ())

    def sample(self, logits_row: torch.Tensor, position: int) -> Sampled:
        """The next token of the sequence, to stand at `position`.

        logits_row: [V] float32 on the CPU, not modified; -inf excludes a token. Raises DeviceError if a logit
        is NaN or +inf, or none is finite.
        """
        logits: FloatArray = logits_row.numpy()
        choice = self.constrain()
        if isinstance(choice, int):
            chosen = choice
        else:
            if choice is not None:
                logits = self._masked(logits, choice)
            chosen = self._choose(logits, position)
        logprob: float | None = None
        top: list[tuple[int, float]] = []
        if self.params.logprobs is not None:
            logprob, top = self._logprobs(logits, chosen, self.params.logprobs)
        sampled = self.accept(chosen, logprob, top)
        if self._history is not None:
            self._history.add(sampled.token_id)
        return sampled

    def constrain(self) -> "int | npt.NDArray[np.bool_] | None":
        """What the guide allows next: one token, some, or, as without a guide, any."""
        self._choice = None if self.guide is None else self.guide.next()
        return self._choice

    def accept(self, chosen: int, logprob: float | None, top: list[tuple[int, float]]) -> Sampled:
        """The token that the sequence gets for the chosen one, which follows what `constrain` said."""
        if self.guide is None:
            return Sampled(chosen, logprob, top)
        token_id = self.guide.accept(chosen)
        if logprob is not None and (isinstance(self._choice, int) or token_id != chosen):
            logprob, top = 0.0, [(token_id, 0.0)][: self.params.logprobs]
        return Sampled(token_id, logprob, top, self.guide.is_thinking, self.guide.is_complete)

    def _masked(self, logits: FloatArray, allowed: npt.NDArray[np.bool_]) -> FloatArray:
        """The logits of allowed tokens, -inf elsewhere, in a buffer that the next call reuses."""
        if self._restricted.size != logits.size:
            self._restricted = np.empty_like(logits)
        self._restricted.fill(-np.inf)
        size = min(allowed.size, logits.size)  # models may have more rows than their vocabulary has tokens
        np.copyto(self._restricted[:size], logits[:size], where=allowed[:size])
        return self._restricted

    def _choose(self, logits: FloatArray, position: int) -> int:
        adjusted = self._adjust(logits)
        token_id = int(adjusted.argmax())
        peak = adjusted[token_id]
        if not math.isfinite(peak):
            raise DeviceError(f"the logits at position {position} are not finite: the largest is {peak}")
        if self._greedy:
            return token_id
        return self._draw(adjusted, peak, uniform(self.seed, position))

    def _adjust(self, logits: FloatArray) -> FloatArray:
        if self._history is None and not self._bias_ids.size:
            return logits
        adjusted = logits.copy()
        if self._history is not None:
            self._history.penalize(adjusted, self.params)
        if self._bias_ids.size:
            adjusted[self._bias_ids] += self._bias
        return adjusted

    def _draw(self, logits: FloatArray, peak: np.float32, random: float) -> int:
        params = self.params
        gaps = self._gaps(logits, peak)
        with np.errstate(over="ignore"):  # infinitely far below the peak is weight 0, as it should be
            gaps /= np.float32(params.temperature)
        ids = nearest(gaps, params.top_k) if 0 < params.top_k < gaps.size else None
        kept_gaps = gaps if ids is None else gaps[ids]
        weights = np.exp(np.negative(kept_gaps, out=kept_gaps), out=kept_gaps)  # of the peak: 1
        for keeps, bound, neutral in (
            (nucleus, params.top_p, 1.0),
            (_at_least, params.min_p, 0.0),
            (typical, params.typical_p, 1.0),
        ):
            if bound != neutral:
                kept = keeps(weights, bound)
                ids, weights = (kept if ids is None else ids[kept]), weights[kept]
        index = invert(weights, random)
        return index if ids is None else int(ids[index])

    def _gaps(self, logits: FloatArray, peak: np.float32) -> FloatArray:
        """How far each logit lies below the peak, in a buffer that the next call reuses."""
        if self._scratch.size != logits.size:
            self._scratch = np.empty_like(logits)
        with np.errstate(over="ignore"):
            return np.subtract(peak, logits, out=self._scratch)

    def _logprobs(
        self, logits: FloatArray, token_id: int, num_top: int
    ) -> tuple[float, list[tuple[int, float]]]:
        """The log-probability of the token, and the most likely ones with theirs."""
        gaps = self._gaps(logits, logits.max())
        logprob, top = logprobs_of(gaps, token_id, num_top)
        if self.guide is not None:  # a token that a grammar excludes is no alternative
            top = [(index, value) for index, value in top if np.isfinite(gaps[index])]
        return logprob, top


class _History:
    """The distinct tokens of a sequence, and how often each was generated."""

    def __init__(self, prompt_token_ids: Sequence[int]):
        distinct = np.unique(np.asarray(prompt_token_ids, np.int64))
        self._size = distinct.size
        self._ids: IdArray = np.concatenate([distinct, np.zeros(256, np.int64)])
        self._counts: FloatArray = np.zeros(self._ids.size, np.float32)
        self._places = {int(token_id): place for place, token_id in enumerate(distinct)}

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, self._size)
        if place == self._size:
            if self._size == self._ids.size:
                self._ids = np.resize(self._ids, 2 * self._size)
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token_id
            self._size += 1
        self._counts[place] += 1

    def penalize(self, logits: FloatArray, params: ResolvedParams) -> None:
        """Repetition over prompt and output (Keskar et al. 2019); presence and frequency over the output."""
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        scores = logits[ids]
        scores = np.where(scores < 0, scores * params.repetition_penalty, scores / params.repetition_penalty)
        scores -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        logits[ids] = scores


def logprobs_of(gaps: FloatArray, token_id: int, num_top: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of a token and the most likely ones; `gaps` is how far each lies below the peak."""
    log_total = math.log(float(np.exp(-gaps).sum(dtype=np.float64)))
    ids = nearest(gaps, min(num_top, gaps.size)) if num_top else np.empty(0, np.int64)
    ids = ids[np.argsort(gaps[ids], kind="stable")]

    def logprob(index: int) -> float:
        return max(FLOOR, -float(gaps[index]) - log_total)

    return logprob(token_id), [(int(index), logprob(index)) for index in ids]


def nearest(gaps: FloatArray, count: int) -> IdArray:
    """Indices, ascending, of the `count` smallest gaps; of equal ones the lower index comes first.

    The minima of interleaved groups bound the count-th smallest gap from above, so few entries are sorted.
    """
    columns = gaps.size // _GROUPS
    if count < columns:
        minima = gaps[: columns * _GROUPS].reshape(_GROUPS, columns).min(axis=0)
        near = np.flatnonzero(gaps <= np.partition(minima, count - 1)[count - 1])
    else:
        near = np.arange(gaps.size)
    return np.sort(_ranked(gaps[near].view(np.uint32), near)[:count])


def nucleus(weights: FloatArray, top_p: float) -> IdArray:
    """Indices, ascending, of the fewest weights that hold `top_p` of the total (Holtzman et al. 2020)."""
    bits = weights.view(np.uint32)
    return fewest(bits.max() - bits, weights, top_p * float(weights.sum(dtype=np.float64)))


def typical(weights: FloatArray, mass: float) -> IdArray:
    """Indices, ascending, of the weights of most expected surprise that hold `mass` (Meister et al. 2022)."""
    possible = np.flatnonzero(weights)
    probabilities = weights[possible].astype(np.float64)
    probabilities /= probabilities.sum()
    surprise = -np.log(probabilities)
    strangeness = np.abs(surprise - probabilities @ surprise).astype(np.float32)
    return possible[fewest(strangeness.view(np.uint32), probabilities, mass)]


def fewest(keys: npt.NDArray[np.uint32], masses: npt.NDArray[Any], target: float) -> IdArray:
    """Indices, ascending, of the first masses that hold `target`, by ascending key and then by index.

    A histogram over the upper half of the keys finds the bucket that reaches the target; only that is sorted.
    The masses hold more than nothing, and the target is above 0 or some key is 0.
    """
    upper = (keys >> np.uint32(16)).astype(np.intp)
    held = np.bincount(upper, weights=masses).cumsum()
    bucket = min(int(np.searchsorted(held, target)), held.size - 1)
    inside = np.flatnonzero(upper == bucket)
    lower = keys[inside]
    ranked = inside if lower.min() == lower.max() else _ranked(lower, inside)
    reached = masses[ranked].cumsum(dtype=np.float64)
    reached += held[bucket - 1] if bucket else 0.0
    kept = upper < bucket
    kept[ranked[: int(np.searchsorted(reached, target)) + 1]] = True
    return np.flatnonzero(kept)


def invert(weights: FloatArray, random: float) -> int:
    """The index at which the cumulative sum of `weights` passes `random` (in [0, 1)) of their total."""
    sums = np.add.reduceat(weights, np.arange(0, weights.size, _BLOCK), dtype=np.float64)
    block, rest = _passes(sums, random * float(sums.cumsum()[-1]))
    index, _ = _passes(weights[block * _BLOCK : (block + 1) * _BLOCK].astype(np.float64), rest)
    return block * _BLOCK + index


def _passes(parts: npt.NDArray[np.float64], target: float) -> tuple[int, float]:
    reached = parts.cumsum()
    last = int(np.searchsorted(reached, reached[-1]))  # the last part that is not 0, in case of rounding
    index = min(int(np.searchsorted(reached, target, side="right")), last)
    return index, target - (float(reached[index - 1]) if index else 0.0)


def _at_least(weights: FloatArray, bound: float) -> IdArray:
    return np.flatnonzero(weights >= np.float32(bound))


def _ranked(bits: npt.NDArray[np.uint32], ids: IdArray) -> IdArray:
    """`ids` by ascending bits and then by id; floats that are not negative sort like their bits."""
    keys = bits.astype(np.uint64) << np.uint64(32) | ids.astype(np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
