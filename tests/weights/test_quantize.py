import os
import subprocess
import sys

import numpy as np
import pytest

from helexa import ops
from helexa.errors import InvalidFile, InvalidParameter
from helexa.quant import FORMATS
from helexa.weights import quantize
from helexa.weights.gguf import open_gguf
from helexa.weights.model_file import open_model
from helexa.weights.recipes import find_recipe

Q4_K_M = find_recipe("q4_k_m")
QUANTIZED = {"blk.0.attn_v.weight": "q4_k", "blk.1.attn_v.weight": "q6_k", "output.weight": "q6_k"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HELEXA_CACHE", str(tmp_path / "cache"))


def numbers(*shape, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 0.05).astype(np.float32)


@pytest.fixture
def source(write_gguf):
    return write_gguf(
        {
            "token_embd.weight": numbers(40, 256),
            "blk.0.attn_norm.weight": numbers(256),
            "blk.0.attn_v.weight": numbers(50, 256, seed=1),
            "blk.1.attn_v.weight": numbers(50, 256, seed=2),
            "output.weight": numbers(40, 256, seed=3),
        },
        add=lambda writer: (writer.add_uint8("odd", 3), writer.add_file_type(0)),
    )


def content(file):
    return {name: (info.format, info.shape, bytes(file.data(name))) for name, info in file.tensors.items()}


def expected(source):
    with open_gguf(source) as file:
        found = content(file)
        for name, format in QUANTIZED.items():
            blocks = ops.quantize("f32", file.data(name), format)
            found[name] = (format, file.tensors[name].shape, blocks.tobytes())
    return found


def test_a_written_file_has_the_recipes_formats_and_all_else_as_it_was(source, tmp_path):
    progress = []
    with open_model(source) as file:
        quantize.write_quantized(
            file, tmp_path / "out.gguf", Q4_K_M, lambda done, total: progress.append((done, total))
        )
    with open_gguf(tmp_path / "out.gguf") as file:
        assert content(file) == expected(source)
        assert file.metadata["general.file_type"] == 15
        assert file.metadata["general.quantization_version"] == 2
        assert file.metadata["odd"] == 3
    assert progress == sorted(progress)
    assert progress[-1][0] == progress[-1][1]


@pytest.mark.parametrize("cache", [False, True])
def test_a_load_sees_the_same_weights_with_and_without_the_cache(source, cache):
    with open_model(source) as file:
        for _ in range(2):
            with quantize.quantized(file, Q4_K_M, cache=cache) as weights:
                assert content(weights) == expected(source)
        assert quantize.cache_path(file, Q4_K_M).is_file() == cache


def test_rows_are_the_same_in_any_ranges(source):
    with open_model(source) as file:
        view = quantize.QuantizedFile(file, QUANTIZED)
        for name, info in view.tensors.items():
            assert info.nbytes == len(view.data(name))
            parts = [bytes(view.rows(name, row, row + 1)) for row in range(info.num_rows)]
            assert b"".join(parts) == bytes(view.data(name))


def test_the_second_load_encodes_nothing(source, monkeypatch):
    with open_model(source) as file:
        with quantize.quantized(file, Q4_K_M, cache=True):
            pass
        monkeypatch.setattr(ops, "quantize", None)
        with quantize.quantized(
            file, Q4_K_M, cache=True, progress=lambda *_: pytest.fail("encoded")
        ) as weights:
            assert content(weights).keys() == file.tensors.keys()


def test_each_recipe_and_each_content_has_a_result_of_its_own(source):
    with open_model(source) as file:
        first, other = (quantize.cache_path(file, find_recipe(name)) for name in ("q4_k_m", "q8_0"))
        assert first != other
        with quantize.quantized(file, Q4_K_M, cache=True):
            pass
        stamp = os.stat(source)
        with source.open("r+b") as changed:
            changed.seek(-1, os.SEEK_END)
            changed.write(b"\1")
        os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    with open_model(source) as file:
        second = quantize.cache_path(file, Q4_K_M)
        assert second != first
        with quantize.quantized(file, Q4_K_M, cache=True):
            pass
    assert list(quantize.cache_folder().iterdir()) == [second]  # the old one has gone


def test_a_damaged_result_is_made_again(source, caplog):
    with open_model(source) as file:
        path = quantize.cache_path(file, Q4_K_M)
        path.parent.mkdir(parents=True)
        path.write_bytes(b"GGUF and then nothing of use")
        with quantize.quantized(file, Q4_K_M, cache=True) as weights:
            assert content(weights) == expected(source)
        assert "quantized_damaged" in caplog.text
        with open_gguf(path) as kept:
            assert content(kept) == expected(source)


def test_what_cannot_be_kept_is_quantized_in_memory(source, caplog, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HELEXA_CACHE", str(tmp_path / "file"))
    with open_model(source) as file, quantize.quantized(file, Q4_K_M, cache=True) as weights:
        assert content(weights) == expected(source)
    assert "quantized_not_kept" in caplog.text


def test_a_full_disk_is_not_written_to(source, caplog, monkeypatch):
    monkeypatch.setattr(quantize, "_free_bytes", lambda folder: 1000)
    with open_model(source) as file, quantize.quantized(file, Q4_K_M, cache=True) as weights:
        assert content(weights) == expected(source)
    assert "quantized_not_kept" in caplog.text
    assert not quantize.cache_folder().exists()


def test_a_file_made_by_the_recipe_loads_as_it_is(source, tmp_path):
    with open_model(source) as file:
        quantize.write_quantized(file, tmp_path / "out.gguf", Q4_K_M)
    with open_model(tmp_path / "out.gguf") as file:
        with quantize.quantized(file, Q4_K_M, cache=True) as weights:
            assert weights is file
        with pytest.raises(InvalidParameter, match="has tensors in q4_k, q6_k already, which q8_0 cannot"):
            quantize.plan(file, find_recipe("q8_0"))


def test_a_model_with_nothing_to_quantize_is_refused(write_gguf):
    with (
        open_model(write_gguf({"blk.0.attn_q.weight": numbers(4, 40)})) as file,
        pytest.raises(InvalidParameter, match="no linear layer whose rows are whole blocks of 32"),
    ):
        quantize.plan(file, Q4_K_M)


def test_a_file_quantized_in_parts_is_refused(write_gguf):
    tensors = {"blk.0.attn_q.weight": ("q8_0", (4, 256)), "output.weight": numbers(40, 256)}
    with (
        open_model(write_gguf(tensors)) as file,
        pytest.raises(InvalidParameter, match="has tensors in q8_0 already"),
    ):
        quantize.plan(file, Q4_K_M)


def test_numbers_that_are_none_are_refused_by_the_tensors_name(write_gguf):
    bad = numbers(4, 256)
    bad[2, 7] = np.nan
    with (
        open_model(write_gguf({"blk.0.attn_q.weight": bad})) as file,
        quantize.quantized(file, Q4_K_M, cache=False) as weights,
        pytest.raises(InvalidFile, match=r"attn_q\.weight' that 1 values are not finite"),
    ):
        weights.data("blk.0.attn_q.weight")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_extra_memory_stays_under_two_tensors(write_gguf, tmp_path):
    """24 tensors of 16 MiB: all of them would be 384 MiB."""
    path = write_gguf({f"blk.{layer}.ffn_up.weight": numbers(4096, 1024) for layer in range(24)})
    script = """
import sys
from pathlib import Path
from helexa.weights import quantize
from helexa.weights.model_file import open_model
from helexa.weights.recipes import find_recipe
def anonymous_kb():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
peak = before = anonymous_kb()
def look(done, total):
    global peak
    peak = max(peak, anonymous_kb())
with open_model(sys.argv[1]) as file:
    quantize.write_quantized(file, Path(sys.argv[2]), find_recipe("q4_k"), look)
print((peak - before) * 1024)
"""
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "out.gguf")]
    extra = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert extra < 2 * 4096 * 1024 * 4
    assert (tmp_path / "out.gguf").stat().st_size > 24 * 4096 * FORMATS["q4_k"].nbytes(1024)
