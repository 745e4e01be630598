"""Tensors as models get them: exact, counted, and refused with a name where they do not fit."""

import re

import numpy as np
import pytest
import torch

from helexa import ops
from helexa.errors import InvalidFile, OutOfMemory
from helexa.quant import FORMATS
from helexa.weights import load
from helexa.weights.gguf import open_gguf
from helexa.weights.load import GGUFWeights, LoadProgress


def values_of(file, name) -> torch.Tensor:
    info = file.tensors[name]
    return torch.from_numpy(FORMATS[info.format].dequantize(bytes(file.data(name)))).reshape(info.shape)


@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize("format", FORMATS)
def test_a_matrix_keeps_its_values_bit_for_bit(write_gguf, format, rows):
    file = open_gguf(write_gguf({"m.weight": (format, (rows, 512))}))
    weight = GGUFWeights(file).linear("m.weight")
    assert (weight.format, weight.rows, weight.cols) == (format, rows, 512)
    assert torch.equal(weight.dequantize(), values_of(file, "m.weight"))


@pytest.mark.parametrize("slice_bytes", [1, 5000, 40_000])
@pytest.mark.parametrize("format", ["f16", "q8_0", "q4_k", "q6_k"])
def test_slices_give_what_the_whole_gives(write_gguf, monkeypatch, format, slice_bytes):
    file = open_gguf(write_gguf({"m": (format, (101, 256))}))
    whole = ops.pack_weight(format, bytes(file.data("m")), 101, 256)
    monkeypatch.setattr(load, "_SLICE_BYTES", slice_bytes)
    assert torch.equal(GGUFWeights(file).linear("m").data, whole.data)


@pytest.mark.parametrize("format", ["f32", "f16", "bf16"])
def test_a_vector_of_any_float_format_is_float32(write_gguf, format):
    file = open_gguf(write_gguf({"norm": (format, (77,))}))
    vector = GGUFWeights(file).vector("norm")
    assert (vector.dtype, vector.shape) == (torch.float32, (77,))
    assert torch.equal(vector, values_of(file, "norm"))


def test_a_tensor_is_converted_once_and_shared(write_gguf):
    weights = GGUFWeights(open_gguf(write_gguf({"m": ("q8_0", (2, 32)), "v": ("f32", (3,))})))
    assert weights.linear("m") is weights.linear("m")
    assert weights.vector("v") is weights.vector("v")


def test_weights_outlive_file_and_source(write_gguf):
    path = write_gguf({"m": ("q4_1", (5, 64)), "v": ("f32", (3,))})
    file = open_gguf(path)
    weights = GGUFWeights(file)
    matrix, vector = weights.linear("m"), weights.vector("v")
    expected = values_of(file, "m"), values_of(file, "v")
    file.close()
    path.unlink()
    del weights, file
    assert torch.equal(matrix.dequantize(), expected[0])
    assert torch.equal(vector, expected[1])


def test_membership_and_what_nobody_asked_for(write_gguf):
    weights = GGUFWeights(open_gguf(write_gguf(dict.fromkeys("abc", ("f32", (2,))) | {"m": ("f32", (1, 2))})))
    assert "a" in weights
    assert "x" not in weights
    weights.vector("b")
    weights.linear("m")
    assert weights.unused() == ["a", "c"]


def test_progress_counts_bytes_and_ends_at_100_percent(write_gguf, monkeypatch):
    monkeypatch.setattr(load, "_SLICE_BYTES", 16 * 1024)
    path = write_gguf({"m": ("f32", (64, 256)), "v": ("f32", (4096,)), "n": ("f32", (16, 1024))})
    reports: list[LoadProgress] = []
    weights = GGUFWeights(open_gguf(path), progress=reports.append)
    assert reports == [LoadProgress("header", 0.0)]
    weights.linear("m")
    weights.vector("v")
    weights.linear("n")
    weights.linear("m")
    percents = [report.percent for report in reports]
    assert {report.phase for report in reports[1:]} == {"weights"}
    assert percents == sorted(percents)
    assert len(reports) == 1 + 4 + 1 + 1
    assert percents[-1] == 100


def test_every_part_of_the_file_is_asked_for_once_and_ahead(write_gguf, monkeypatch):
    monkeypatch.setattr(load, "_SLICE_BYTES", 4096)
    file = open_gguf(write_gguf({f"m{i}": ("f32", (16, 160)) for i in range(9)}))
    asked: list[int] = []
    monkeypatch.setattr(file, "prefetch", lambda offset, nbytes: asked.append(offset))
    weights = GGUFWeights(file)
    for name, info in file.tensors.items():
        weights.linear(name)
        assert max(asked) > info.offset + 4096
    assert len(asked) == len(set(asked))
    assert set(range(4096, file.nbytes, 4096)) <= set(asked)


def test_source_pages_leave_the_process_while_loading(write_gguf, monkeypatch):
    monkeypatch.setattr(load, "_SLICE_BYTES", 1 << 20)
    path = write_gguf({"m": np.zeros((4096, 4096), np.float32)})
    weights = GGUFWeights(open_gguf(path))

    def resident_kib() -> int:
        with open("/proc/self/smaps") as maps:
            entry = maps.read().split(str(path))[1]
        return int(re.search(r"Rss:\s+(\d+)", entry)[1])

    most = 0

    def report(progress: LoadProgress) -> None:
        nonlocal most
        most = max(most, resident_kib())

    weights._progress = report
    weights.linear("m")
    assert most < 4 << 10


@pytest.mark.parametrize(
    ("method", "name", "message"),
    [
        ("linear", "x", "found no tensor 'x' among 5, expected one"),
        ("vector", "x", "found no tensor 'x' among 5, expected one"),
        ("linear", "d", "found tensor 'd', f32 [1, 2, 1, 4], expected a matrix"),
        ("vector", "e", "found tensor 'e', f32 [2, 3, 4], expected a vector"),
        ("vector", "m", "found tensor 'm', q8_0 [2, 32], expected one of f32, f16, bf16"),
        ("vector", "q", "found tensor 'q', q8_0 [64], expected one of f32, f16, bf16"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(write_gguf, method, name, message):
    tensors = {"m": ("q8_0", (2, 32)), "v": ("f32", (3,)), "e": ("f32", (2, 3, 4)), "q": ("q8_0", (64,))}
    tensors["d"] = ("f32", (1, 2, 1, 4))
    weights = GGUFWeights(open_gguf(write_gguf(tensors)))
    with pytest.raises(InvalidFile, match=re.escape(f"tiny.gguf: {message}")):
        getattr(weights, method)(name)
    assert weights.unused() == list(tensors)


def test_a_vector_is_a_matrix_of_one_row(write_gguf):
    weights = GGUFWeights(open_gguf(write_gguf({"v": ("f32", (64,))})))
    matrix = weights.linear("v")
    assert (matrix.rows, matrix.cols) == (1, 64)
    assert torch.equal(matrix.dequantize()[0], weights.vector("v"))


def test_too_little_memory_is_an_error_with_the_tensor_and_the_bytes(write_gguf, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(ops, "empty_packed", refuse)
    weights = GGUFWeights(open_gguf(write_gguf({"m": ("f32", (16, 32))})))
    with pytest.raises(
        OutOfMemory, match=r"no 2048 bytes of memory for tensor 'm': .*Cannot allocate memory"
    ):
        weights.linear("m")
