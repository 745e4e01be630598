"""What a request may say about sampling, in which ranges, and what holds where it says nothing.

The order is: the request, then the generation config that the model's file recommends, then neutral values.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from helexa.engine.grammar import GrammarSpec
from helexa.engine.guide import Thinking
from helexa.errors import InvalidFile, InvalidParameter

MAX_LOGPROBS = 20  # the limit of OpenAI's top_logprobs

_MANY = 2**63 - 1


def _check_number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not (low < number if above else low <= number) or not number <= high:
        bounds = f"above {low:g} and up to {high:g}" if above else f"from {low:g} to {high:g}"
        raise InvalidParameter(f"{name} is {value!r}; expected a number {bounds}", param=name)


def _check_integer(name: str, value: object, low: int, high: int = _MANY) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        bounds = f"of at least {low}" if high == _MANY else f"from {low} to {high}"
        raise InvalidParameter(f"{name} is {value!r}; expected an integer {bounds}", param=name)


def _check_distribution(params: Any) -> None:
    """Raises InvalidParameter for a number out of its range; None passes."""
    for name, low, high, above in (
        ("temperature", 0.0, 100.0, False),
        ("top_p", 0.0, 1.0, False),
        ("min_p", 0.0, 1.0, False),
        ("typical_p", 0.0, 1.0, True),
        ("repetition_penalty", 0.01, 100.0, False),  # beyond, scores would overflow
        ("presence_penalty", -2.0, 2.0, False),
        ("frequency_penalty", -2.0, 2.0, False),
    ):
        value = getattr(params, name)
        if value is not None:
            _check_number(name, value, low, high, above=above)
    if params.top_k is not None:
        _check_integer("top_k", params.top_k, -1)


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What holds where a request says nothing: neutral values, or those the model's file recommends."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1: off
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        _check_distribution(self)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """Defaults with the `general.sampling.*` values of a file; InvalidFile if one is out of range."""
        names = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
        names["penalty_repeat"] = "repetition_penalty"
        found = {name: metadata.get(f"general.sampling.{key}") for key, name in names.items()}
        try:
            return cls(**{name: value for name, value in found.items() if value is not None})
        except InvalidParameter as error:
            raise InvalidFile(f"general.sampling in the model's metadata: {error.message}") from error


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """The part of a request's sampling that no model has an opinion about."""

    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None  # None: a fresh one for each request
    logprobs: int | None = None  # how many alternatives to report beside the token; None: no logprobs
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    ignore_eos: bool = False
    grammar: GrammarSpec | None = None  # what the answer follows; after the block in which the model thinks
    thinking: Thinking | None = None

    def __post_init__(self) -> None:
        for token_id, bias in (self.logit_bias or {}).items():
            if not isinstance(token_id, int) or token_id < 0:
                message = f"logit_bias has the key {token_id!r}; expected a token id"
                raise InvalidParameter(message, param="logit_bias")
            _check_number("logit_bias", bias, -100, 100)
        for name, low, high in (
            ("seed", -(2**63), 2**64 - 1),
            ("logprobs", 0, MAX_LOGPROBS),
            ("max_tokens", 1, _MANY),
        ):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), low, high)
        for stop in self.stop:
            if not isinstance(stop, str) or not stop:
                raise InvalidParameter(f"stop has {stop!r}; expected non-empty strings", param="stop")
        for token_id in self.stop_token_ids:
            _check_integer("stop_token_ids", token_id, 0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises InvalidParameter if logit_bias or stop_token_ids name a token beyond the vocabulary."""
        for name, token_ids in (
            ("logit_bias", self.logit_bias or {}),
            ("stop_token_ids", self.stop_token_ids),
        ):
            for token_id in token_ids:
                if token_id >= vocab_size:
                    message = f"{name} names token {token_id}; the model's vocabulary has {vocab_size} tokens"
                    raise InvalidParameter(message, param=name)


@dataclass(frozen=True, kw_only=True)
class ResolvedParams(RequestLimits, SamplingDefaults):
    """Sampling parameters with nothing left open: what a `Sampler` runs on."""

    def __post_init__(self) -> None:
        RequestLimits.__post_init__(self)
        SamplingDefaults.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class SamplingParams(RequestLimits):
    """What a request asks for; None leaves a number to the model's generation config and the defaults.

    Raises InvalidParameter, naming the field, for a value out of range.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_distribution(self)

    def resolve(self, generation_defaults: SamplingDefaults | None = None) -> ResolvedParams:
        """These parameters with every open number taken from the defaults."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = generation_defaults or SamplingDefaults()
        for field in fields(SamplingDefaults):
            if values[field.name] is None:
                values[field.name] = getattr(defaults, field.name)
        return ResolvedParams(**values)
