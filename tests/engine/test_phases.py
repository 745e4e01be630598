"""How long the parts of a load take."""

import logging

import pytest

from helexa.engine import Engine
from helexa.engine.phases import Phases
from support.hf_checkpoint import GOLDEN


def test_parts_of_one_name_add_up_also_those_that_fail():
    phases = Phases()
    with phases("copy"):
        pass
    once = phases.seconds["copy"]
    with pytest.raises(ValueError, match="cut"), phases("copy"):
        raise ValueError("cut")
    assert phases.timed("text", lambda: 7) == 7
    assert once < phases.seconds["copy"]
    assert set(phases.fields()) == {"copy_s", "text_s"}


def test_a_load_says_where_its_time_went(caplog):
    with caplog.at_level(logging.INFO, "helexa.engine.engine"), Engine.load(GOLDEN / "qwen3.gguf"):
        (record,) = (record for record in caplog.records if record.message == "model_loaded")
    parts = {
        "header_s",
        "plan_s",
        "text_s",
        "text_wait_s",
        "device_s",
        "place_s",
        "build_s",
        "copy_s",
        "caches_s",
    }
    assert parts <= set(record.fields)
    waited = parts - {"text_s"}  # beside the others
    assert sum(record.fields[part] for part in waited) <= record.fields["load_s"] + 0.01
