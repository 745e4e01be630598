"""Weights in the layout of devices: packed, looked up, unpacked, and multiplied by many rows."""

import contextlib
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from helexa import ops
from helexa.ops import dequantize, main_memory
from helexa.quant import FORMATS
from support.random_weights import QUANTIZED, decoded, random_raw

pytestmark = pytest.mark.cuda

FLOATS = ("f32", "f16", "bf16")


def width(format: str) -> int:
    """An odd number of the format's blocks that no tile of 64 or 256 columns divides."""
    return {1: 100, 32: 352, 256: 768}[FORMATS[format].block_size]


@pytest.fixture
def packed(cuda_device):
    """A random matrix on the device, and its values."""

    def make(format: str, rows: int, cols: int, seed: int = 0):
        raw = random_raw(format, rows, cols, seed)
        return ops.pack_weight(format, raw, rows, cols, cuda_device), decoded(format, raw, rows, cols)

    return make


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("format", FORMATS)
def test_weights_on_a_device_decode_to_the_files_values_bit_for_bit(packed, format, rows):
    weight, values = packed(format, rows, width(format), rows)
    assert torch.equal(weight.dequantize().cpu(), values)


@pytest.mark.parametrize("format", QUANTIZED)
def test_random_bytes_decode_bit_for_bit_with_infinite_and_subnormal_scales(cuda_device, format):
    layout = FORMATS[format]
    cols = 3 * layout.block_size
    raw = np.random.default_rng(3).integers(0, 256, (32, 3 * layout.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = decoded(format, raw, 32, cols)
    actual = ops.pack_weight(format, raw, 32, cols, cuda_device).dequantize().cpu()
    assert torch.equal(expected.isnan(), actual.isnan())
    assert torch.equal(expected.nan_to_num(), actual.nan_to_num())


@pytest.mark.parametrize("format", FORMATS)
def test_weights_on_a_device_take_the_files_bytes(cuda_device, format):
    assert ops.packed_nbytes(format, 48, 512, cuda_device) == 48 * FORMATS[format].nbytes(512)


@pytest.mark.parametrize("format", ["q8_0", "q4_k", "f16"])
def test_slices_in_any_order_equal_the_whole(cuda_device, format):
    rows, cols = 75, 256
    raw = random_raw(format, rows, cols)
    whole = ops.pack_weight(format, raw, rows, cols, cuda_device)
    sliced = ops.empty_packed(format, rows, cols, device=cuda_device)
    for first, last in ((64, 75), (0, 32), (32, 64)):
        ops.pack_rows(format, raw[first:last].copy(), first, last - first, sliced)
    assert torch.equal(whole.data, sliced.data)


def test_weights_of_one_device_arena_lie_apart_and_outlive_it(cuda_device):
    spaced = ops.DeviceArena.spaced(ops.packed_nbytes("q8_0", 48, 96, cuda_device))
    arena = ops.DeviceArena(2 * spaced, cuda_device)
    raws = [random_raw("q8_0", 48, 96, seed) for seed in range(3)]
    weights = [ops.empty_packed("q8_0", 48, 96, arena) for _ in raws]
    shared = arena.memory.untyped_storage().data_ptr()
    del arena
    for raw, weight in zip(raws, weights, strict=True):
        ops.pack_rows("q8_0", raw, 0, 48, weight)
    for raw, weight in zip(raws, weights, strict=True):
        assert torch.equal(weight.dequantize().cpu(), decoded("q8_0", raw, 48, 96))
    storages = [weight.data.untyped_storage().data_ptr() for weight in weights]
    assert storages[:2] == [shared, shared]
    assert storages[2] != shared  # did not fit


@pytest.mark.parametrize("format", FORMATS)
def test_embedding_is_the_rows_of_the_ids(packed, poisoned, cuda_device, format):
    weight, values = packed(format, 37, width(format))
    ids = torch.tensor([36, 0, -1, 17, 17, 37, 2**31 - 1], dtype=torch.int32, device=cuda_device)
    out = poisoned(7, weight.cols).to(cuda_device)
    expected = torch.cat([values[[36, 0]], torch.zeros(1, weight.cols), values[[17, 17]]])
    expected = torch.cat([expected, torch.zeros(2, weight.cols)])
    assert ops.embedding(ids, weight, out=out) is out
    assert torch.equal(out.cpu(), expected)


def test_the_embedding_of_no_tokens_is_empty(packed, cuda_device):
    weight, _ = packed("q4_k", 3, 256)
    assert ops.embedding(torch.empty(0, dtype=torch.int32, device=cuda_device), weight).shape == (0, 256)


@pytest.fixture
def in_main_memory(cuda_device):
    """A table of the rows of `raw` that the device can read."""

    def make(format: str, raw: np.ndarray, cols: int) -> ops.RowTable:
        table = ops.empty_table(format, len(raw), cols, torch.device(cuda_device))
        loader = ops.WeightLoader(cuda_device, num_readers=1)
        loader.pin(table, "table")
        loader.keep(table, 0, table.rows, lambda: raw, "table")
        loader.finish(lambda nbytes: None)
        return table

    return make


@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_looked_up_in_main_memory(in_main_memory, poisoned, cuda_device, format):
    cols = width(format)
    raw = random_raw(format, 37, cols, 5)
    table, values = in_main_memory(format, raw, cols), decoded(format, raw, 37, cols)
    ids = torch.tensor([36, 0, -1, 17, 17, 37, 1, 2**31 - 1], dtype=torch.int32, device=cuda_device)
    out = poisoned(8, cols).to(cuda_device)
    none = torch.zeros(1, cols)
    expected = torch.cat([values[[36, 0]], none, values[[17, 17]], none, values[[1]], none])
    assert ops.embedding(ids, table, out=out) is out
    assert torch.equal(out.cpu(), expected)
    assert torch.equal(ops.embedding_reference(ids[:2], table), values[[36, 0]])


@pytest.mark.parametrize("format", QUANTIZED)
def test_rows_in_main_memory_decode_as_those_on_the_device_do(in_main_memory, packed, cuda_device, format):
    layout = FORMATS[format]
    cols = 3 * layout.block_size
    raw = np.random.default_rng(4).integers(0, 256, (32, 3 * layout.block_bytes), dtype=np.uint8)
    ids = torch.arange(32, dtype=torch.int32, device=cuda_device)
    with np.errstate(all="ignore"):
        expected = decoded(format, raw, 32, cols)
    actual = ops.embedding(ids, in_main_memory(format, raw, cols)).cpu()
    assert torch.equal(expected.isnan(), actual.isnan())
    assert torch.equal(expected.nan_to_num(), actual.nan_to_num())


def test_a_captured_lookup_in_main_memory_follows_the_ids(in_main_memory, cuda_device, cuda_capture):
    raw = random_raw("q4_k", 40, 512)
    table = in_main_memory("q4_k", raw, 512)
    ids = torch.tensor([3, 4], dtype=torch.int32, device=cuda_device)
    replay, out = cuda_capture(lambda: ops.embedding(ids, table))
    ids.copy_(torch.tensor([39, 0], dtype=torch.int32))
    replay()
    assert torch.equal(out.cpu(), decoded("q4_k", raw, 40, 512)[[39, 0]])


def test_the_cpu_looks_up_packed_rows_only(in_main_memory, cuda_device):
    if cuda_device == "cpu":
        pytest.skip("main memory stands for a device")
    table = in_main_memory("q8_0", random_raw("q8_0", 16, 64), 64)
    with pytest.raises(ValueError, match="ids on cpu"):
        ops.embedding(torch.zeros(1, dtype=torch.int32), table)


def test_main_memory_is_given_back_with_the_last_of_its_tensors(cuda_device, monkeypatch):
    ended = []

    def unpin(*where):
        maps = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
        assert any(int(first, 16) <= where[0] < int(end, 16) for first, end in maps)
        ended.append(where)

    monkeypatch.setattr(main_memory, "_unpin", unpin)
    table = ops.empty_table("f16", 5000, 100, torch.device(cuda_device))
    address, part = table.data.data_ptr(), table.data[100:200]
    del table
    assert not ended
    del part
    assert ended == [(address, 1003520, torch.device(cuda_device))]  # whole pages


def test_memory_that_goes_while_a_thread_captures_is_given_back_by_another(monkeypatch):
    capturing, ended = threading.get_ident(), []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: threading.get_ident() == capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    unpin = lambda *where: ended.append((threading.get_ident() == capturing, *where))  # noqa: E731
    monkeypatch.setattr(main_memory, "_C", type("Extension", (), {"unpin": staticmethod(unpin)}))
    main_memory._unpin(4096, 8192, torch.device("cuda", 0))
    assert ended == [(False, 4096, 8192, main_memory.PIECE_BYTES)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_some_rows_are_unpacked_as_wide_as_asked_for(packed, poisoned, cuda_device, format, dtype):
    weight, values = packed(format, 41, width(format))
    space = poisoned(25, weight.cols + 8, dtype=dtype).to(cuda_device)
    ops.dequantize_rows(weight, 16, 25, space[:, : weight.cols])
    assert torch.equal(space[:, : weight.cols].cpu(), values[16:].to(dtype))
    assert space[:, weight.cols :].isnan().all()


def test_rows_that_do_not_begin_a_tile_or_end_beyond_the_matrix_are_refused(packed, cuda_device):
    weight, _ = packed("q4_0", 40, 64)
    out = torch.empty(8, 64, device=cuda_device)
    for first in (8, -16, 48):
        with pytest.raises(ValueError, match="not in tiles of 40 rows"):
            ops.dequantize_rows(weight, first, 8, out)
    with pytest.raises(ValueError, match="out"):
        ops.dequantize_rows(weight, 0, 16, out)
    with pytest.raises(ValueError, match="not aligned"):
        ops.dequantize_rows(weight, 0, 8, torch.empty(8, 65, device=cuda_device)[:, :64])


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part_outputs", [1, 40 * 70, 10**9])
def test_a_product_with_unpacked_weights_is_that_of_their_values(
    packed, poisoned, cuda_device, assert_close, monkeypatch, out_dtype, part_outputs
):
    monkeypatch.setattr(dequantize, "_PART_OUTPUTS", part_outputs)
    monkeypatch.setattr(dequantize, "_CACHED_BYTES", 1)
    monkeypatch.setattr(dequantize, "_PART_STEP", 16)
    formats = [*FORMATS, "bf16", "q6_k"]
    weights = [packed(format, 16 + 11 * i, 512, i)[0] for i, format in enumerate(formats)]
    biases = [
        torch.randn(weight.rows, device=cuda_device) if i % 3 else None for i, weight in enumerate(weights)
    ]
    x = torch.randn(70, 512, device=cuda_device).bfloat16()
    out = poisoned(70, sum(weight.rows for weight in weights), dtype=out_dtype).to(cuda_device)
    ops.unpacked_matmul(x, weights, biases, out)
    reference = ops.unpacked_matmul_reference(x, weights, biases)
    assert_close(
        "unpacked_matmul", reference.to(out_dtype), out, 1e-5 if out_dtype == torch.float32 else 3e-3
    )
    wrong = ops.unpacked_matmul_reference(x, weights[::-1], biases[::-1]).to(out_dtype)
    with pytest.raises(AssertionError):
        assert_close("unpacked_matmul", wrong, out, 0.1)


def test_parts_hold_every_row_once_and_no_more_than_fits(packed):
    weights = [packed("q4_0", rows, 64)[0] for rows in (16, 17, 5, 300, 1, 64)]
    parts = list(dequantize._parts(weights, 48))
    assert all(sum(end - first for _, first, end in part) <= 48 for part in parts)
    assert all(first % 16 == 0 for part in parts for _, first, _ in part)
    rows = [(weight, row) for part in parts for weight, first, end in part for row in range(first, end)]
    assert rows == [(weight, row) for weight in weights for row in range(weight.rows)]


def test_a_product_whose_sizes_do_not_fit_is_refused(packed, cuda_device):
    weight, _ = packed("q8_0", 16, 64)
    x = torch.zeros(70, 96, dtype=torch.bfloat16, device=cuda_device)
    with pytest.raises(ValueError, match=r"weight \[16, 64\] does not fit x \(70, 96\)"):
        ops.unpacked_matmul(x, [weight], None, torch.empty(70, 16, device=cuda_device))
    with pytest.raises(ValueError, match="no 16 columns"):
        ops.unpacked_matmul(x[:, :64].contiguous(), [weight], None, torch.empty(70, 8, device=cuda_device))


def test_threads_have_scratches_of_their_own(cuda_device):
    device, found = torch.device(cuda_device), []

    def take() -> None:
        found.append(dequantize._scratch(device, 64))

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0].data_ptr() != found[1].data_ptr()
