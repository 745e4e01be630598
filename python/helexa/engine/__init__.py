"""The inference engine: loads a model and serves token ids, text and logits from it. Imports torch."""

from helexa.engine.engine import Engine
from helexa.engine.grammar import GrammarSpec
from helexa.engine.guide import Thinking
from helexa.engine.options import EngineOptions, EngineStats
from helexa.engine.sampling_params import SamplingDefaults, SamplingParams
from helexa.engine.sequence import GenerationProgress
from helexa.engine.stream import Delta, TokenLogprob, Usage

__all__ = [
    "Delta",
    "Engine",
    "EngineOptions",
    "EngineStats",
    "GenerationProgress",
    "GrammarSpec",
    "SamplingDefaults",
    "SamplingParams",
    "Thinking",
    "TokenLogprob",
    "Usage",
]
