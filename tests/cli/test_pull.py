"""`helexa pull` and `helexa models`."""

import io
import json
import sys

import gguf
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from helexa.cli import app
from helexa.cli import models as models_module
from helexa.cli import pull as pull_module
from helexa.errors import SourceError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("HELEXA_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path / "models"


def _put(cache, name="org/repo/Tiny-Q8_0.gguf"):
    """A tiny file with a header that says what a listing shows."""
    path = cache / name
    path.parent.mkdir(parents=True)
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(4096)
    writer.add_file_type(7)
    writer.add_tensor("output.weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _run(*arguments):
    return CliRunner().invoke(app, arguments)


def test_pull_prints_the_path_of_what_is_there_already(cache):
    path = _put(cache)
    done = _run("pull", "org/repo:Q8_0")
    assert (done.exit_code, done.stdout.strip()) == (0, str(path))


def test_pull_fetches_the_starter_unless_told_otherwise(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(pull_module, "pull", lambda name, report: asked.append(name) or tmp_path)
    assert _run("pull").exit_code == 0
    assert asked == ["starter"]


def test_pull_of_what_does_not_exist_is_an_error_for_the_user():
    error = _run("pull", "nonsense").exception
    assert isinstance(error, SourceError)
    assert "expected 'starter', ORG/REPO" in error.message


def test_the_bar_says_what_goes_on_and_how_far_it_is(monkeypatch, tmp_path):
    def pull(name, report):
        report("waiting", 0, 0)
        report("downloading", 50_000_000, 100_000_000)
        return tmp_path

    monkeypatch.setattr(pull_module, "pull", pull)
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120)
    monkeypatch.setattr(pull_module.Progress, "stop", lambda bar: bar.refresh())
    assert pull_module.fetch("starter", console) == tmp_path
    assert "downloading starter" in shown.getvalue()
    assert "50.0/100.0 MB" in shown.getvalue()


def test_models_of_an_empty_cache_say_how_to_get_one(cache):
    assert f"no models in {cache}; `helexa pull starter`" in _run("models").stdout
    assert json.loads(_run("models", "--json").stdout) == []


def test_models_lists_what_the_headers_say(cache):
    path = _put(cache)
    done = _run("models")
    assert done.exit_code == 0
    header, row = done.stdout.splitlines()
    assert header.split() == ["name", "size", "architecture", "quantization", "context"]
    assert row.split()[0] == "org/repo:Q8_0"
    assert row.split()[-3:] == ["qwen3", "Q8_0", "4096"]
    assert json.loads(_run("models", "--json").stdout) == [
        {
            "name": "org/repo:Q8_0",
            "path": str(path),
            "size_bytes": path.stat().st_size,
            "architecture": "qwen3",
            "quantization": "Q8_0",
            "context_length": 4096,
            "error": None,
        }
    ]


def test_a_broken_file_is_listed_as_such(cache):
    path = _put(cache)
    path.write_bytes(path.read_bytes()[:100])
    assert "broken" in _run("models").stdout
    assert "Tiny-Q8_0.gguf" in json.loads(_run("models", "--json").stdout)[0]["error"]


def test_without_the_engine_models_are_listed_by_name_and_size(cache, monkeypatch):
    _put(cache)
    monkeypatch.setattr(models_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "helexa.weights.facts", None)
    assert _run("models").stdout.splitlines()[1].split()[-3:] == ["?", "?", "?"]
