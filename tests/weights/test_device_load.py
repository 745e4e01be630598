"""Loading to a device: every tensor exact whatever the order, and nothing left behind where it fails."""

import os
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch

from helexa import ops
from helexa.errors import InvalidFile, OutOfMemory
from helexa.quant import FORMATS
from helexa.weights.gguf import open_gguf
from helexa.weights.load import GGUFWeights, LoadProgress
from helexa.weights.quantize import QuantizedFile

pytestmark = pytest.mark.cuda

TENSORS = {
    "a": ("q4_k", (101, 512)),
    "b": ("q8_0", (37, 96)),
    "c": ("f16", (20, 50)),
    "stack": ("q6_k", (3, 18, 256)),
    "norm": ("f32", (77,)),
    "taps": ("f32", (9, 4)),
    "bias": ("bf16", (33,)),
    "row": ("f32", (64,)),
}
MATRICES, VECTORS = ("a", "b", "c", "stack", "row"), ("norm", "taps", "bias")


def values_of(file, name) -> torch.Tensor:
    info = file.tensors[name]
    return torch.from_numpy(FORMATS[info.format].dequantize(bytes(file.data(name)))).reshape(info.shape)


@pytest.fixture
def readers() -> int:
    return ops.default_readers()


@pytest.fixture(autouse=True)
def no_reader_stays():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader-")]


@pytest.mark.parametrize("slot_bytes", [1, 20_000, 8 << 20])
def test_all_tensors_arrive_bit_for_bit(write_gguf, cuda_device, readers, monkeypatch, slot_bytes):
    monkeypatch.setattr(ops, "SLOT_BYTES", slot_bytes)
    file = open_gguf(write_gguf(TENSORS))
    with GGUFWeights(file, device=cuda_device, num_readers=readers) as weights:
        matrices = {name: weights.linear(name) for name in MATRICES}
        vectors = {name: weights.vector(name) for name in VECTORS}
        assert weights.linear("a") is matrices["a"]
    for name, matrix in matrices.items():
        values = values_of(file, name)
        assert torch.equal(matrix.dequantize().cpu(), values.reshape(matrix.rows, matrix.cols))
    for name, vector in vectors.items():
        assert vector.dtype == torch.float32
        assert torch.equal(vector.cpu(), values_of(file, name))
    assert weights.unused() == []


def test_everything_lies_in_one_allocation(write_gguf, cuda_device, readers):
    file = open_gguf(write_gguf(TENSORS))
    with GGUFWeights(file, device=cuda_device, num_readers=readers) as weights:
        tensors = [weights.linear(name).data for name in MATRICES] + [
            weights.vector(name) for name in VECTORS
        ]
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert len(storages) == 1
    places = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors)
    assert all(first + size <= second for (first, size), (second, _) in pairwise(places))
    assert sum(size for _, size in places) > 0.8 * tensors[0].untyped_storage().nbytes()


def test_blocks_of_rows_are_put_one_after_the_other(write_gguf, cuda_device, readers, monkeypatch):
    monkeypatch.setattr(ops, "SLOT_BYTES", 7000)
    file = open_gguf(write_gguf({"m": ("q4_0", (100, 320))}))
    blocks = ((90, 100), (0, 33), (40, 41))
    with GGUFWeights(file, device=cuda_device, num_readers=readers) as weights:
        weight = weights.linear("m", blocks)
    values = values_of(file, "m")
    expected = torch.cat([values[first:end] for first, end in blocks])
    assert torch.equal(weight.dequantize().cpu(), expected)


@pytest.mark.parametrize("slot_bytes", [1, 20_000, 8 << 20])
def test_tables_stay_in_main_memory(write_gguf, cuda_device, readers, monkeypatch, slot_bytes):
    monkeypatch.setattr(ops, "SLOT_BYTES", slot_bytes)
    file = open_gguf(write_gguf(TENSORS))
    names = {"a", "c"}
    with GGUFWeights(file, device=cuda_device, num_readers=readers, tables=names) as weights:
        tables = {name: weights.table(name) for name in names}
        other = weights.table("b")
        assert weights.table("a") is tables["a"]
    for name, table in tables.items():
        assert isinstance(table, ops.RowTable)
        assert table.data.device.type == "cpu"
        assert bytes(table.data.numpy()) == bytes(file.data(name))
        ids = torch.tensor([table.rows - 1, 0], dtype=torch.int32, device=cuda_device)
        assert torch.equal(ops.embedding(ids, table).cpu(), values_of(file, name)[[-1, 0]])
    assert isinstance(other, ops.PackedWeight)
    assert torch.equal(other.dequantize().cpu(), values_of(file, "b"))
    assert not names & {*weights.unused()}


def test_tables_take_nothing_of_the_device(write_gguf, cuda_device, readers):
    file = open_gguf(write_gguf(TENSORS))
    with GGUFWeights(file, device=cuda_device, num_readers=readers) as weights:
        everything = weights.placed_bytes
    with GGUFWeights(file, device=cuda_device, num_readers=readers, tables={"a"}) as weights:
        table = weights.table("a")
    assert weights.placed_bytes <= everything - table.data.nbytes
    assert weights.parked_bytes == weights.placed_bytes + table.data.nbytes


def test_tables_whose_rows_lie_in_no_file_are_asked_for(write_gguf, cuda_device, readers, monkeypatch):
    monkeypatch.setattr(ops, "SLOT_BYTES", 10_000)
    source = open_gguf(write_gguf({"m": ("f32", (70, 256))}))
    file = QuantizedFile(source, {"m": "q8_0"})
    with GGUFWeights(file, device=cuda_device, num_readers=readers, tables={"m"}) as weights:
        table = weights.table("m")
    assert torch.equal(table.dequantize(), values_of(file, "m"))


def test_rows_that_lie_in_no_file_are_asked_for(write_gguf, cuda_device, readers, monkeypatch):
    monkeypatch.setattr(ops, "SLOT_BYTES", 10_000)
    file = open_gguf(write_gguf({"m": ("q8_0", (70, 256)), "kept": ("f32", (70, 256))}))
    in_files = file.row_ranges
    monkeypatch.setattr(
        file, "row_ranges", lambda name, *rows: None if name == "m" else in_files(name, *rows)
    )
    with GGUFWeights(file, device=cuda_device, num_readers=readers) as weights:
        made, kept = weights.linear("m"), weights.linear("kept")
    assert torch.equal(made.dequantize().cpu(), values_of(file, "m"))
    assert torch.equal(kept.dequantize().cpu(), values_of(file, "kept"))


@pytest.mark.parametrize("slot_bytes", [10_000, 8 << 20])
@pytest.mark.parametrize("is_in_file", [True, False])
def test_floats_are_quantized_on_the_device_as_the_host_does_it(
    write_gguf, cuda_device, readers, monkeypatch, slot_bytes, is_in_file
):
    monkeypatch.setattr(ops, "SLOT_BYTES", slot_bytes)
    formats = {"a": "q8_0", "b": "q4_k", "c": "q6_k", "d": "q5_k", "e": "q4_0"}
    floats = ("f32", "f16", "bf16")
    shapes = {name: (floats[i % 3], (70 - i, 256)) for i, name in enumerate(formats)}
    source = open_gguf(write_gguf({**shapes, "kept": ("bf16", (70, 256))}))
    file = QuantizedFile(source, formats)
    expected = {name: values_of(file, name) for name in (*formats, "kept")}
    monkeypatch.setattr(ops, "quantize", None)
    if not is_in_file:
        monkeypatch.setattr(source, "row_ranges", lambda *rows: None)
    reports: list[LoadProgress] = []
    with GGUFWeights(file, device=cuda_device, num_readers=readers, progress=reports.append) as weights:
        matrices = {name: weights.linear(name) for name in expected}
        blocks = weights.linear("b", ((16, 32), (0, 5)))
    for name, matrix in matrices.items():
        assert matrix.format == file.tensors[name].format
        assert torch.equal(matrix.dequantize().cpu(), expected[name])
    assert torch.equal(blocks.dequantize().cpu(), torch.cat([expected["b"][16:32], expected["b"][:5]]))
    assert reports[-1].percent == 100


def test_what_cannot_be_quantized_fails_the_load(write_gguf, cuda_device, readers):
    values = np.ones((4096, 512), np.float32)
    values[3000, 5] = np.nan
    source = open_gguf(write_gguf({"l": np.ones((64, 32), np.float32), "m": values}))
    file = QuantizedFile(source, {"l": "q8_0", "m": "q4_k"})
    weights = GGUFWeights(file, device=cuda_device, num_readers=readers)
    weights.linear("l"), weights.linear("m")
    with pytest.raises(
        InvalidFile, match="found in tensor 'm' that 1 values are not finite or too large for q4_k"
    ):
        weights.finish()


def test_a_file_that_is_cut_fails_the_load_by_name(write_gguf, cuda_device, readers):
    path = write_gguf({"m": ("q8_0", (4096, 512)), "n": ("q8_0", (4096, 512))})
    file = open_gguf(path)
    os.truncate(path, file.nbytes - 100_000)
    weights = GGUFWeights(file, device=cuda_device, num_readers=readers)
    matrix = weights.linear("m").data
    weights.linear("n")
    with pytest.raises(InvalidFile, match="found a file cut while open, expected all of tensor 'n'"), weights:
        pass
    assert matrix.untyped_storage().nbytes() == 0


def test_a_file_that_cannot_be_read_fails_the_load_with_the_reason_and_the_tensor(
    write_gguf, cuda_device, readers, tmp_path
):
    file = open_gguf(write_gguf({"m": ("q8_0", (4096, 512))}))
    (descriptor,) = {at for at, *_ in file.row_ranges("m", 0, 1)}
    with open(tmp_path / "other", "wb") as other:
        os.dup2(other.fileno(), descriptor)  # which can be written only
    weights = GGUFWeights(file, device=cuda_device, num_readers=readers)
    weights.linear("m")
    with pytest.raises(InvalidFile, match="Bad file descriptor while reading tensor 'm'"):
        weights.finish()


def test_a_load_that_fails_elsewhere_is_given_up(write_gguf, cuda_device, readers):
    file = open_gguf(write_gguf({f"m{i}": ("q8_0", (512, 512)) for i in range(20)}))
    weights = GGUFWeights(file, device=cuda_device, num_readers=readers)

    def build() -> None:
        with weights:
            for name in file.tensors:
                weights.linear(name)
            raise RuntimeError("no such layer")

    matrix = weights.linear("m0").data
    with pytest.raises(RuntimeError, match="no such layer"):
        build()
    assert matrix.untyped_storage().nbytes() == 0
    weights.finish()  # nothing is left to wait for


def test_progress_is_told_on_the_callers_thread_and_ends_at_100_percent(write_gguf, cuda_device, readers):
    reports: list[tuple[LoadProgress, int]] = []
    file = open_gguf(write_gguf(TENSORS))
    with GGUFWeights(
        file,
        device=cuda_device,
        num_readers=readers,
        progress=lambda progress: reports.append((progress, threading.get_ident())),
    ) as weights:
        for name in MATRICES:
            weights.linear(name)
        for name in VECTORS:
            weights.vector(name)
    percents = [progress.percent for progress, _ in reports]
    assert percents == sorted(percents)
    assert (percents[0], round(percents[-1], 6)) == (0, 100)
    assert {thread for _, thread in reports} == {threading.get_ident()}


def test_a_tensor_that_is_asked_for_after_the_load_is_packed_at_once(write_gguf, cuda_device, readers):
    file = open_gguf(write_gguf(TENSORS))
    with GGUFWeights(file, device=cuda_device, num_readers=readers) as weights:
        weights.linear("a")
    assert torch.equal(weights.linear("b").dequantize().cpu(), values_of(file, "b"))


def test_a_device_without_room_is_an_error_with_the_bytes(write_gguf, cuda_device, readers, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise torch.OutOfMemoryError("nothing is free")

    monkeypatch.setattr(ops, "DeviceArena", type("Full", (ops.DeviceArena,), {"__init__": refuse}))
    file = open_gguf(write_gguf({"m": ("f32", (16, 32))}))
    with pytest.raises(OutOfMemory, match=r"no 2304 bytes of memory on .* for the weights: nothing is free"):
        GGUFWeights(file, device=cuda_device, num_readers=readers)


def test_bytes_of_main_memory_are_copied_as_they_are(cuda_device, readers):
    source = torch.randint(0, 256, (100_000,), dtype=torch.uint8)
    target = torch.zeros(100_000, dtype=torch.uint8, device=cuda_device)
    loader = ops.WeightLoader(cuda_device, part_bytes=40_960, num_readers=readers)
    with pytest.raises(ValueError, match="slots 40960"):
        loader.copy(target, source, "all")
    for first in range(0, 100_000, 40_960):
        loader.copy(target[first : first + 40_960], source[first : first + 40_960], "some")
    done = []
    loader.finish(done.append)
    assert done[-1] == 100_000
    assert torch.equal(target.cpu(), source)


@pytest.mark.parametrize("slot_bytes", [4096, 8 << 20])
def test_parked_weights_come_back_as_they_were_without_the_file(
    write_gguf, cuda_device, readers, monkeypatch, slot_bytes
):
    monkeypatch.setattr(ops, "SLOT_BYTES", slot_bytes)
    path = write_gguf(TENSORS)
    file = open_gguf(path)
    blocks, whole = ((16, 32), (0, 8)), [name for name in MATRICES if name != "stack"]
    with GGUFWeights(file, device=cuda_device, num_readers=readers) as weights:
        for name in whole:
            weights.linear(name)
        weights.linear("stack", blocks)
        vectors = {name: weights.vector(name).cpu() for name in VECTORS}
    before = {name: weights.linear(name).dequantize().cpu() for name in whole}
    before_blocks = weights.linear("stack", blocks).dequantize().cpu()
    parked = weights.park()
    assert parked is not None
    del weights
    monkeypatch.setattr(file, "row_ranges", None)
    monkeypatch.setattr(file, "data", None)
    again = GGUFWeights(file, device=cuda_device, num_readers=readers, parked=parked)
    with again:
        for name, values in vectors.items():
            assert torch.equal(again.vector(name).cpu(), values)
            assert again.vector(name).shape == values.shape
        matrices = {name: again.linear(name) for name in whole}
        cut = again.linear("stack", blocks)
    for name, values in before.items():
        assert torch.equal(matrices[name].dequantize().cpu(), values)
    assert torch.equal(cut.dequantize().cpu(), before_blocks)
    assert again.unused() == []


def test_parked_tables_are_the_same_memory(write_gguf, cuda_device, readers, monkeypatch):
    file = open_gguf(write_gguf(TENSORS))
    with GGUFWeights(file, device=cuda_device, num_readers=readers, tables={"a"}) as weights:
        table, b = weights.table("a"), weights.linear("b")
    parked = weights.park()
    assert parked.nbytes == weights.parked_bytes
    values = b.dequantize().cpu()
    monkeypatch.setattr(file, "row_ranges", None)
    with GGUFWeights(file, device=cuda_device, num_readers=readers, parked=parked, tables={"a"}) as again:
        assert again.table("a") is table
        b = again.linear("b")
    assert torch.equal(b.dequantize().cpu(), values)


@pytest.mark.parametrize(("before", "after"), [({"a"}, set()), (set(), {"a"})])
def test_what_was_parked_elsewhere_is_read(write_gguf, cuda_device, readers, before, after):
    file = open_gguf(write_gguf(TENSORS))
    with GGUFWeights(file, device=cuda_device, num_readers=readers, tables=before) as weights:
        weights.table("a")
    parked = weights.park()
    with GGUFWeights(file, device=cuda_device, num_readers=readers, parked=parked, tables=after) as weights:
        table = weights.table("a")
    assert isinstance(table, ops.RowTable) == bool(after)
    assert torch.equal(table.dequantize().cpu(), values_of(file, "a"))


def test_what_was_not_parked_is_read(write_gguf, cuda_device, readers):
    file = open_gguf(write_gguf(TENSORS))
    with GGUFWeights(file, device=cuda_device, num_readers=readers) as weights:
        weights.linear("a")
    parked = weights.park()
    with GGUFWeights(file, device=cuda_device, num_readers=readers, parked=parked) as weights:
        a, b, norm = weights.linear("a"), weights.linear("b"), weights.vector("norm")
    assert torch.equal(a.dequantize().cpu(), values_of(file, "a"))
    assert torch.equal(b.dequantize().cpu(), values_of(file, "b"))
    assert torch.equal(norm.cpu(), values_of(file, "norm"))


def test_weights_that_main_memory_has_no_room_for_are_not_parked(
    write_gguf, cuda_device, readers, monkeypatch, caplog
):
    with GGUFWeights(open_gguf(write_gguf(TENSORS)), device=cuda_device, num_readers=readers) as weights:
        weights.linear("a")

    def refuse(self: object, nbytes: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(ops.WeightArena, "take", refuse)
    assert weights.park() is None
    assert "weights_not_parked" in caplog.text
