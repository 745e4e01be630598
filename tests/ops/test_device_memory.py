"""Captures of one thread beside another that gives memory back."""

import threading

import pytest
import torch

from helexa import ops


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self, events):
        self.events = events

    def capture_begin(self, pool, mode):
        self.events.append(mode)

    def capture_end(self):
        self.events.append("end")


def test_memory_is_not_given_back_while_another_thread_captures(monkeypatch):
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("given back"))
    other = threading.Thread(target=ops.free_unused)
    with ops.captured(Graph(events), (0, 0)):
        other.start()
        other.join(0.2)
        assert events == ["thread_local"]
    other.join(10)
    assert events == ["thread_local", "end", "given back"]


def test_a_capture_that_fails_ends(monkeypatch):
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("given back"))
    with pytest.raises(ValueError, match="no kernel"), ops.captured(Graph(events), (0, 0)):
        raise ValueError("no kernel")
    ops.free_unused()
    assert events == ["thread_local", "end", "given back"]
