"""The cache of models: what is in it and by which names it is found."""

import subprocess
import sys

import pytest

from helexa.errors import SourceError
from helexa.weights import starter
from helexa.weights.sources import list_models, models_folder, pull, resolve
from support.model_cache import CONTENT, put

pytestmark = pytest.mark.usefixtures("cache")


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    assert models_folder() == tmp_path / "cache" / "models"
    monkeypatch.delenv("HELEXA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(models_folder()) == "/somewhere/helexa/models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(models_folder()) == "/home/someone/.cache/helexa/models"


def test_an_empty_cache_lists_nothing(cache):
    assert list_models() == []
    assert not cache.exists()


def test_every_listed_name_resolves_to_its_file(cache):
    for name in (
        f"starter/{starter.FILE}",
        "org/repo/Tiny-Q8_0.gguf",
        "org/repo/Tiny-Q4_0.gguf",
        "org/twins/a-Q8_0.gguf",
        "org/twins/sub/b-Q8_0.gguf",
        "org/plain/model.gguf",
        "loose.gguf",
        ".partial/org--repo/growing.gguf",
    ):
        put(cache, name)
    entries = list_models()
    assert [entry.name for entry in entries] == [
        "loose",
        "org/plain:model.gguf",
        "org/repo:Q4_0",
        "org/repo:Q8_0",
        "org/twins:a-Q8_0.gguf",
        "org/twins:sub/b-Q8_0.gguf",
        "starter",
    ]
    for entry in entries:
        assert resolve(entry.name) == pull(entry.name) == entry.path
        assert entry.size_bytes == len(CONTENT)


def test_names_in_other_case_and_without_quantization_resolve_too(cache):
    path = put(cache, "org/repo/Tiny-Q8_0.gguf")
    assert resolve("org/repo") == resolve("org/repo:q8_0") == resolve("org/repo:tiny-q8_0.gguf") == path


def test_a_path_is_itself(tmp_path, monkeypatch):
    path = put(tmp_path, "own.gguf")
    monkeypatch.chdir(tmp_path)
    assert resolve(str(path)) == path
    assert resolve("own.gguf").samefile(path)
    assert pull("./own.gguf").samefile(path)


@pytest.mark.parametrize("name", ["/no/where.gguf", "./nowhere", "nowhere.gguf"])
def test_a_path_to_nothing_says_so(name):
    for find in (resolve, pull):
        with pytest.raises(SourceError, match=f"there is no file {name}"):
            find(name)


def test_what_is_not_there_comes_with_advice_and_what_is_there(cache):
    with pytest.raises(
        SourceError,
        match="'starter' is not in the cache; `helexa pull starter` fetches it; the cache has nothing",
    ):
        resolve("starter")
    put(cache, "org/repo/Tiny-Q8_0.gguf")
    with pytest.raises(
        SourceError, match=r"'org/repo:Q4_0' is not in the cache; .*; the cache has org/repo:Q8_0"
    ):
        resolve("org/repo:Q4_0")
    with pytest.raises(SourceError, match="'gpt' is no model; expected 'starter', ORG/REPO"):
        pull("gpt")


def test_the_module_needs_the_base_installation_only():
    code = "import sys, helexa.weights.sources; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("name", ["/" + "x" * 5000, "/x" * 5000, "/a\0b", "~nobody/x", "x" * 5000 + ".gguf"])
def test_what_can_be_no_name_of_a_file_is_none(name):
    with pytest.raises(SourceError, match="there is no file"):
        resolve(name)


def test_a_directory_is_itself(tmp_path, monkeypatch):
    path = put(tmp_path, "own/model/config.json", b"{}").parent
    monkeypatch.chdir(tmp_path)
    assert resolve(str(path)) == pull(str(path)) == resolve(str(path / "config.json")) == path
    assert resolve("own/model").samefile(path)
    assert resolve("./own/model/config.json").samefile(path)
