"""Names of models on the hub, and the files they mean."""

import pytest

from helexa.errors import SourceError
from helexa.weights.names import (
    checkpoint_files,
    is_hub_name,
    named_recipe,
    pick,
    quantization_of,
    split_hub_name,
)

_FILES = ["README.md", "Tiny-Q8_0.gguf", "Tiny-Q4_K_M.gguf", "Tiny.BF16.gguf", "mmproj-F16.gguf"]


@pytest.mark.parametrize("name", ["org/repo", "Qwen/Qwen3-0.6B-GGUF", "a/b:Q4_K_M", "a/b:sub/file-Q8_0.gguf"])
def test_names_of_the_hub_are_known(name):
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "starter",
        "/a/b",
        "./a/b",
        "a/b/c",
        "~/a",
        "a/..",
        "../b",
        "a/b:",
        "a/b:../c",
        "a/b:/etc/passwd",
        ".a/b",
        "",
    ],
)
def test_paths_and_other_texts_are_not_names_of_the_hub(name):
    assert not is_hub_name(name)


def test_a_name_is_split_at_its_colon():
    assert split_hub_name("a/b") == ("a/b", None)
    assert split_hub_name("a/b:Q8_0") == ("a/b", "Q8_0")


@pytest.mark.parametrize(
    ("file", "quantization"),
    [
        ("Qwen3-0.6B-Q8_0.gguf", "Q8_0"),
        ("tinyllama-1.1b.q4_k_m.gguf", "Q4_K_M"),
        ("Model-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("Q6_K/model-Q6_K-00001-of-00002.gguf", "Q6_K"),
        ("model-IQ4_XS.gguf", "IQ4_XS"),
        ("model-bf16.gguf", "BF16"),
        ("model.gguf", None),
        ("qwen3.gguf", None),
    ],
)
def test_the_quantization_is_read_from_a_files_name(file, quantization):
    assert quantization_of(file) == quantization


@pytest.mark.parametrize("wanted", ["Q8_0", "q8_0", "Tiny-Q8_0.gguf", "tiny-q8_0", "TINY-Q8_0.GGUF"])
def test_a_file_is_meant_by_quantization_or_name_in_any_case(wanted):
    assert pick("a/b", _FILES, wanted) == "Tiny-Q8_0.gguf"


def test_without_a_wish_the_usual_quantization_is_taken():
    assert pick("a/b", _FILES, None) == "Tiny-Q4_K_M.gguf"
    assert pick("a/b", ["x.gguf", "notes.txt"], None) == "x.gguf"
    assert pick("a/b", ["x-IQ1_S.gguf", "x-Q8_0.gguf"], None) == "x-Q8_0.gguf"


def test_a_wish_that_nothing_fits_is_answered_with_the_nearest_and_all():
    with pytest.raises(SourceError, match=r"a/b has no 'q4_k_s'; did you mean a/b:Q4_K_M\? it has .*Q8_0"):
        pick("a/b", _FILES, "q4_k_s")
    with pytest.raises(SourceError, match="a/b has no 'zzz'; it has Q4_K_M, Q8_0, BF16"):
        pick("a/b", _FILES, "zzz")


def test_a_recipe_means_the_checkpoint_where_there_is_no_gguf_file():
    files = ["config.json", "model.safetensors", "README.md"]
    assert checkpoint_files(files, "Q4_K_M") == ["model.safetensors", "config.json"]
    assert checkpoint_files([*files, "x-Q8_0.gguf"], "Q4_K_M") == []
    assert checkpoint_files(files, "IQ1_S") == []


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("a/b:q8_0", "q8_0"),
        ("a/b:Q4_K_M", "Q4_K_M"),
        ("a/b:IQ1_S", None),
        ("a/b", None),
        ("./a/b:q8_0", None),
    ],
)
def test_a_name_may_ask_for_a_recipe(name, recipe):
    assert named_recipe(name) == recipe


def test_files_that_cannot_be_told_apart_are_named():
    with pytest.raises(
        SourceError, match=r"'Q8_0' of a/b may be x-Q8_0.gguf or y-Q8_0.gguf; say which: a/b:x-Q8_0.gguf"
    ):
        pick("a/b", ["x-Q8_0.gguf", "y-Q8_0.gguf"], "Q8_0")
    with pytest.raises(SourceError, match=r"a/b has several files; say which, as in a/b:x.gguf"):
        pick("a/b", ["x.gguf", "y.gguf"], None)


def test_a_file_in_parts_and_a_repository_without_gguf_are_refused():
    with pytest.raises(SourceError, match="is split over several files"):
        pick("a/b", ["x-Q8_0-00001-of-00002.gguf", "x-Q8_0-00002-of-00002.gguf"], "Q8_0")
    with pytest.raises(SourceError, match="a/b has no GGUF file"):
        pick("a/b", ["model.safetensors", "mmproj-F16.gguf"], None)
