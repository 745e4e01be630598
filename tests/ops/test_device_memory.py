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


@pytest.mark.cuda
@pytest.mark.parametrize("count", [1, 7, 16])
def test_parts_of_a_page_go_to_main_memory_and_back_without_memory_of_the_device(cuda_device, count):
    page = torch.randn(4, 16, 8, device=cuda_device).bfloat16()
    part, kept = page[:, :count], page.clone()
    there = torch.empty(part.shape, dtype=part.dtype, pin_memory=page.is_cuda)
    before = torch.cuda.memory_stats()["allocation.all.allocated"] if page.is_cuda else 0
    ops.copy_across(there, part)
    if page.is_cuda:
        torch.cuda.synchronize()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert torch.equal(there, kept[:, :count].cpu())
    page.zero_()
    ops.copy_across(part, there)
    assert torch.equal(page[:, :count], kept[:, :count])
    assert not page[:, count:].any()


def test_tensors_without_runs_are_copied_too():
    source = torch.randn(4, 6).T
    target = torch.empty(6, 4)
    ops.copy_across(target, source)
    assert torch.equal(target, source)
    with pytest.raises(ValueError, match="differ"):
        ops.copy_across(target, source.T)
