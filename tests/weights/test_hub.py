"""Files and checkpoints of the hub, through a fake one on loopback."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import file_download

from helexa.errors import SourceError
from helexa.weights import hub, sources
from helexa.weights.sources import list_models, pull, resolve
from support.model_cache import CONTENT, visible

pytestmark = pytest.mark.usefixtures("cache")


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
    assert visible(cache) == ["org/repo/Tiny-Q8_0.gguf"]
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
    assert visible(cache) == []
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
    assert visible(cache) == []


def test_a_file_larger_than_the_disk_is_refused_before_the_download(cache, fake_hub, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: _Usage)
    with pytest.raises(SourceError, match=r"needs 0\.0 GB more, and the disk of .* has 0\.0 GB free"):
        pull("org/repo:Q8_0")
    assert fake_hub.served == 0


class _Usage:
    free = 10


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
    assert visible(cache) == [f"org/repo/{name}" for name in TAKEN]
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
