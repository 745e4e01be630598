"""Devices are ready for a load before there is one."""

import logging

import pytest

from helexa.engine import rehearsal
from helexa.engine.device import Device
from helexa.engine.engine import Engine
from helexa.errors import OutOfMemory


@pytest.mark.cuda
def test_a_rehearsal_goes_through_loads_and_steps(cuda_device, monkeypatch, caplog):
    seen = []
    logits = Engine.logits

    def counted(self, tokens):
        found = logits(self, tokens)
        seen.append((self.config.model_type, found.shape, bool((found == 0).all())))
        return found

    monkeypatch.setattr(Engine, "logits", counted)
    with caplog.at_level(logging.INFO, "helexa.engine.rehearsal"):
        rehearsal.rehearse([Device(cuda_device)])
    assert [record.message for record in caplog.records] == ["device_rehearsed"]
    assert seen == [("qwen3", (2, 1024), True), ("qwen3moe", (2, 1024), True)]


def test_a_rehearsal_that_fails_is_no_fault(monkeypatch, caplog):
    def refuse(*arguments, **options):
        raise OutOfMemory("nothing is free")

    monkeypatch.setattr(rehearsal, "_run", refuse)
    with caplog.at_level(logging.INFO, "helexa.engine.rehearsal"):
        rehearsal.rehearse([Device("cuda:0"), Device("cuda:1")])
    assert [record.message for record in caplog.records] == ["device_not_rehearsed"] * 2
