"""Engines whose weights wait in main memory while they are not on the device."""

import logging

import numpy as np
import pytest

from helexa import ops
from helexa.engine.engine import Engine
from helexa.errors import InvalidFile
from helexa.weights.parking import Parking
from support.hf_checkpoint import GOLDEN
from support.model_runs import golden

CASES = ["qwen3", "qwen3next"]


def logits(case: str, parking: Parking | None, **options: object) -> np.ndarray:
    with Engine.load(GOLDEN / f"{case}.gguf", max_context=512, parking=parking, **options) as engine:
        return engine.logits(golden(case).token_ids.tolist()[:20])


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES)
def test_an_engine_comes_back_from_main_memory_the_same(case, cuda_device, monkeypatch):
    device = {} if cuda_device == "cpu" else {"device": cuda_device}
    parking = Parking(1 << 30)
    options = {"quant": "q8_0", "quant_cache": False, **device}
    expected = logits(case, None, **options)
    assert np.array_equal(logits(case, parking, **options), expected)
    assert parking.held_bytes > 0

    def refuse(*arguments: object) -> None:
        raise InvalidFile("the weights are read again")

    monkeypatch.setattr(ops.WeightLoader, "pack", refuse)
    assert np.array_equal(logits(case, parking, **options), expected)
    with pytest.raises(InvalidFile, match="read again"):
        logits("llama_linear_rope_two_pages", parking, **options)


@pytest.mark.cuda
def test_weights_beyond_the_budget_are_not_parked(cuda_device):
    device = {} if cuda_device == "cpu" else {"device": cuda_device}
    parking = Parking(1000)
    logits("qwen3", parking, **device)
    assert parking.held_bytes == 0


def test_weights_in_main_memory_are_not_parked_there_again(caplog):
    if ops.is_tiled("cpu"):
        pytest.skip("main memory stands for a device")
    parking = Parking(1 << 30)
    with caplog.at_level(logging.WARNING):
        logits("qwen3", parking)
    assert parking.held_bytes == 0
    assert "weights_not_parked" not in caplog.text
