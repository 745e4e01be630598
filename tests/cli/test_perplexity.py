"""Perplexity, divergence and agreement on models whose answers are known exactly."""

import math

import numpy as np
import pytest

from helexa.cli.perplexity import cut, evaluate, log_probabilities
from helexa.errors import BadRequest

VOCABULARY = 16


class Letters:
    """A tokenizer with one token per character, which may lead with a beginning-of-sequence token."""

    def __init__(self, adds_begin: bool):
        self.bos_token_id = 0
        self.adds_begin = adds_begin

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        begin = [0] if add_special and self.adds_begin else []
        return begin + [1 + ord(letter) % (VOCABULARY - 1) for letter in text]


class Predictor:
    """Gives the token `answer` the probability `share`, and all others the same."""

    def __init__(self, share: float, answer: int = 3):
        self.share = share
        self.answer = answer

    def logits(self, token_ids: list[int]) -> np.ndarray:
        probabilities = np.full((len(token_ids), VOCABULARY), (1 - self.share) / (VOCABULARY - 1))
        probabilities[:, self.answer] = self.share
        return np.log(probabilities).astype(np.float32) + 7.0  # a constant does not change a softmax


def test_chunks_are_whole_and_lead_with_the_begin_token_if_the_model_wants_it() -> None:
    with_begin = cut(Letters(adds_begin=True), "abcdefghij", 4)
    assert [len(chunk) for chunk in with_begin] == [4, 4]
    assert [chunk[0] for chunk in with_begin] == [0, 0]
    without = cut(Letters(adds_begin=False), "abcdefghij", 4)
    assert without == [Letters(False).encode("abcd"), Letters(False).encode("efgh")]


def test_a_text_shorter_than_one_chunk_is_refused_with_its_length() -> None:
    with pytest.raises(BadRequest, match="3 tokens; one chunk needs 8"):
        cut(Letters(adds_begin=False), "abc", 8)


def test_guessing_evenly_has_the_vocabulary_as_its_perplexity() -> None:
    result = evaluate(Predictor(1 / VOCABULARY), [[1, 2, 3, 4, 5, 6, 7, 8]] * 3)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert result.scored_tokens == 3 * 3  # positions 5, 6 and 7 of each chunk
    assert result.standard_error == pytest.approx(0, abs=1e-5)
    assert result.mean_kl_divergence is None


def test_only_the_second_half_of_a_chunk_counts() -> None:
    model = Predictor(0.5)
    assert evaluate(model, [[9, 9, 9, 9, 9, 3, 3, 3]]).perplexity == pytest.approx(2, rel=1e-6)
    assert evaluate(model, [[3, 3, 3, 3, 3, 9, 9, 9]]).perplexity == pytest.approx(30, rel=1e-6)


def test_a_model_does_not_diverge_from_itself() -> None:
    result = evaluate(Predictor(0.5), [[1] * 300], reference=Predictor(0.5))
    assert result.mean_kl_divergence == pytest.approx(0, abs=1e-9)
    assert result.top1_agreement == 1.0


def test_divergence_is_that_of_the_model_from_the_reference() -> None:
    result = evaluate(Predictor(0.25), [[1] * 8], reference=Predictor(0.5))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log((0.5 / 15) / (0.75 / 15))
    assert result.mean_kl_divergence == pytest.approx(expected, rel=1e-5)
    assert evaluate(Predictor(0.5), [[1] * 8], reference=Predictor(0.5, answer=4)).top1_agreement == 0.0


def test_progress_reports_the_perplexity_so_far() -> None:
    seen: list[float] = []
    evaluate(Predictor(0.5), [[3] * 8, [3] * 8], progress=seen.append)
    assert seen == [pytest.approx(2), pytest.approx(2)]


def test_log_probabilities_sum_to_one_even_for_large_logits() -> None:
    rows = log_probabilities(np.array([[1e4, 1e4 - 1, 0.0]], np.float32))
    assert np.exp(rows).sum() == pytest.approx(1)
