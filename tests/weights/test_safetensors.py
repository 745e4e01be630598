"""Safetensors files and checkpoints: what is sound is read in place, all else is refused with a sentence."""

import json
import os
import re
import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.errors import InvalidFile, UnsupportedModel
from helexa.weights.safetensors import Checkpoint, SafetensorsFile
from support.hf_checkpoint import write_safetensors

MATRIX = np.arange(12, dtype=np.float32).reshape(3, 4)


def write_raw(path, header, data=bytes(48)):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype="F32", shape=(3, 4), offsets=(0, 48)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_tensors_are_views_of_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": ("F32", MATRIX), "b": ("F16", MATRIX.astype(np.float16))})
    with SafetensorsFile(path) as file:
        a = file.tensors["a"]
        assert (a.shape, a.dtype, a.nbytes) == ((3, 4), "f32", 48)
        assert file.tensors["b"].dtype == "f16"
        view = file.data("a")
    assert view.readonly
    assert np.array_equal(np.frombuffer(view, np.float32).reshape(3, 4), MATRIX)  # after closing, too


def test_types_that_are_not_known_are_listed_all_the_same(tmp_path):
    path = write_raw(tmp_path / "x.safetensors", {"a": entry("F4", (7,), (0, 4))})
    with SafetensorsFile(path) as file:
        assert file.tensors["a"].dtype == "f4"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "found a header that cannot be read"),
        (b"[1]", "found a header that is no object"),
        (b'{"a": {}, "a": {}}', "a name is there twice"),
        ({"a": 5}, "found tensor 'a' as {}"),
        ({"a": entry(offsets=(0, 49))}, "expected dtype, shape and data_offsets within the 48 bytes"),
        ({"a": entry(offsets=(40, 8))}, "expected dtype, shape and data_offsets"),
        ({"a": entry(offsets=(-8, 40))}, "expected dtype, shape and data_offsets"),
        ({"a": entry(shape=(3, True))}, "expected dtype, shape and data_offsets"),
        ({"a": entry(shape=(3, 5))}, r"found 48 bytes of tensor 'a', expected those of F32 \[3, 5\]"),
        ({"a": entry(), "b": entry("F32", (1,), (44, 48))}, "found tensor 'b' within another"),
    ],
)
def test_a_header_that_breaks_a_rule_is_refused(tmp_path, header, message):
    with pytest.raises(InvalidFile, match=message):
        SafetensorsFile(write_raw(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize(
    "content", [b"", b"abc", struct.pack("<Q", 1 << 60) + b"{}", b"PK\x03\x04" + bytes(60)]
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InvalidFile, match=r"x.safetensors: found"):
        SafetensorsFile(path)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_file_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content + bytes(8))
    with suppress(InvalidFile):
        SafetensorsFile(path).close()


def test_a_file_that_is_cut_while_open_is_noticed(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": ("F32", MATRIX)})
    with SafetensorsFile(path) as file:
        os.truncate(path, 40)
        with pytest.raises(InvalidFile, match="expected tensor 'a' up to byte"):
            file.data("a")


# Checkpoints


def write_parts(path, weight_map, parts):
    for name, tensors in parts.items():
        write_safetensors(path / name, dict.fromkeys(tensors, ("F32", MATRIX)))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_says_what_is_where(tmp_path):
    write_parts(
        tmp_path,
        {"a": "1.safetensors", "b": "2.safetensors"},
        {"1.safetensors": ["a", "other"], "2.safetensors": ["b"], "3.safetensors": ["a"]},
    )
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b"}
        assert bytes(checkpoint.data("b")) == MATRIX.tobytes()
        assert checkpoint.nbytes == sum((tmp_path / f"{n}.safetensors").stat().st_size for n in (1, 2))


def test_without_an_index_all_files_count(tmp_path):
    for name in "ab":
        write_safetensors(tmp_path / f"{name}.safetensors", {name: ("F32", MATRIX)})
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b"}
    write_safetensors(tmp_path / "c.safetensors", {"a": ("F32", MATRIX)})
    with pytest.raises(InvalidFile, match="found tensor 'a' again"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "found no weight_map"),
        ({"a": "../1.safetensors"}, "expected a file beside the index"),
        ({"a": 5}, "expected a file beside the index"),
        ({"a": "2.safetensors"}, "2.safetensors: cannot be opened: No such file"),
        ({"z": "1.safetensors"}, "1.safetensors: found no tensor 'z', which model.safetensors.index.json"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, weight_map, message):
    write_parts(tmp_path, weight_map, {"1.safetensors": ["a"]})
    with pytest.raises(InvalidFile, match=re.escape(message)):
        Checkpoint(tmp_path)


def test_weights_in_other_formats_are_named(tmp_path):
    with pytest.raises(InvalidFile, match="found no weights, expected"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(
        UnsupportedModel, match=r"found weights in pytorch_model.bin, expected .* safetensors"
    ):
        Checkpoint(tmp_path)
