"""What a neuron does before it is asked to."""

import logging

import pytest

from helexa.engine import parts
from helexa.engine.device import Device
from helexa.engine.engine import Engine
from helexa.errors import InvalidParameter
from helexa.neuron import ahead
from helexa.neuron.ahead import read_vocabularies, rehearse_loads
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


@pytest.mark.parametrize(("device", "expected"), [("cpu", []), ("auto", ["cuda:0"]), ("cuda:7", None)])
def test_loads_are_rehearsed_where_models_may_be_loaded(monkeypatch, device, expected):
    rehearsed = []

    def found(name):
        if name == "cuda:7":
            raise InvalidParameter("there is no such device", param="device")
        return [Device("cpu")] if name == "cpu" else [Device("cuda:0"), Device("cpu")]

    monkeypatch.setattr(ahead, "find_devices", found)
    monkeypatch.setattr(ahead, "rehearse", lambda devices: rehearsed.append([one.name for one in devices]))
    rehearse_loads(device)
    assert rehearsed == ([] if expected is None else [expected])
