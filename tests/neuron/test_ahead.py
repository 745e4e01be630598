"""What a neuron does before it is asked to."""

import logging

import pytest

from helexa.engine import parts
from helexa.engine.engine import Engine
from helexa.neuron import ahead
from helexa.neuron.ahead import prepare, read_vocabularies
from helexa.neuron.config import ModelEntry
from support.hf_checkpoint import GOLDEN


def test_models_that_are_loaded_later_find_their_vocabulary_read(monkeypatch, caplog):
    monkeypatch.setattr(parts, "_text_parts", type(parts._text_parts)())
    path = str(GOLDEN / "qwen3.gguf")
    entries = [
        ModelEntry(id="now", source="/nowhere/now.gguf"),
        ModelEntry(id="gone", source="/nowhere/gone.gguf", load=False),
        ModelEntry(id="later", source=path, load=False),
    ]
    with caplog.at_level(logging.INFO, "helexa.neuron.ahead"):
        read_vocabularies(entries)
    (record,) = caplog.records
    assert (record.message, record.fields["model"]) == ("vocabulary_not_read", "gone")
    (read,) = parts._text_parts.values()
    monkeypatch.setattr(parts, "read_text_parts", lambda file: 1 / 0)
    with Engine.load(path, max_context=256) as engine:
        assert engine.tokenizer is read.tokenizer


@pytest.mark.parametrize(("loads", "expected"), [([], 1), ([False], 1), ([False, True], 0)])
def test_devices_are_prepared_unless_a_model_has_done_it(monkeypatch, loads, expected):
    rehearsals = []
    monkeypatch.setattr(ahead, "rehearse", lambda: rehearsals.append(1))
    prepare([ModelEntry(id=f"m{i}", source="/nowhere", load=load) for i, load in enumerate(loads)])
    assert len(rehearsals) == expected
