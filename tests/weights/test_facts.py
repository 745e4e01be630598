"""Descriptions of files from their headers."""

import gguf
import numpy as np
import pytest

from helexa.errors import InvalidFile
from helexa.weights.facts import ModelFacts, describe


def test_a_file_is_described_by_its_header(write_gguf):
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_name("Tiny")
        writer.add_context_length(4096)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)

    path = write_gguf({"m": ("q4_k", (3, 256)), "v": np.ones(5, np.float32)}, architecture="qwen3", add=add)
    assert describe(path) == ModelFacts("Tiny", "qwen3", "Q4_K_M", 4096, 3 * 256 + 5, path.stat().st_size)


def test_what_a_file_does_not_say_is_left_open(write_gguf):
    facts = describe(write_gguf({}))
    assert (facts.name, facts.context_length, facts.quantization, facts.num_parameters) == (
        None,
        0,
        "unknown",
        0,
    )


def test_values_of_a_wrong_type_count_as_not_said(write_gguf):
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_array("general.name", ["a"])
        writer.add_string("llama.context_length", "long")
        writer.add_array("general.file_type", [1])

    facts = describe(write_gguf({"m": ("q8_0", (1, 32))}, add=add))
    assert (facts.name, facts.context_length, facts.quantization) == (None, 0, "Q8_0")


@pytest.mark.parametrize("kind", [5, 1024, 2**32 - 1])
def test_without_a_known_file_type_the_format_of_most_values_is_named(write_gguf, kind):
    tensors = {"a": ("q4_k", (4, 256)), "b": ("q6_k", (1, 256)), "c": ("f32", (1000,))}
    facts = describe(write_gguf(tensors, add=lambda writer: writer.add_file_type(kind)))
    assert facts.quantization == "Q4_K"


def test_every_label_is_that_of_the_gguf_package(write_gguf):
    for kind in gguf.LlamaFileType:
        path = write_gguf({"m": ("f32", (1, 1))}, add=lambda writer, kind=kind: writer.add_file_type(kind))
        label = kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")
        assert describe(path).quantization in (label, "F32")


def test_a_broken_file_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"nothing of this kind")
    with pytest.raises(InvalidFile, match=r"x\.gguf: at byte 0: found b'noth'"):
        describe(tmp_path / "x.gguf")
