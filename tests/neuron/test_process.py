"""The daemon as a process of its own, with the real engine."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "llama.gguf"
WAIT_S = 90


class Daemon:
    def __init__(self, folder: Path, *arguments: str):
        self.log = folder / "neuron.log"
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "helexa.cli.neuron", "--port", "0", *arguments]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        found = self.until(lambda: re.search(r"event=listening url=(\S+)", self.log.read_text()))
        self.url = found[1]

    def until(self, condition: Any) -> Any:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := condition():
                return found
            time.sleep(0.05)
        pytest.fail(f"the neuron did not come so far:\n{self.log.read_text()}")

    def request(self, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data), timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path, "--model", f"tiny={GOLDEN}", "--model", "gone=/nowhere/gone.gguf")
    yield made
    made.process.kill()
    made.process.wait()


def test_a_neuron_starts_serves_and_stops(daemon):
    daemon.until(lambda: daemon.request("/health")[1]["activation"]["state"] == "ready")
    _, health = daemon.request("/health")
    assert health["status"] == "degraded"
    assert health["activation"]["completed"] == ["tiny"]
    assert health["activation"]["failed"][0]["code"] == "repo_fetch_failed"
    models = {model["id"]: model for model in daemon.request("/models")[1]}
    assert models["tiny"]["status"] == "loaded"
    assert models["tiny"]["architecture"] == "llama"
    assert "/nowhere/gone.gguf" in models["gone"]["error"]["message"]

    status, refusal = daemon.request("/v1/completions", {"model": "tiny", "prompt": [1, 2]})
    assert (status, refusal["error"]["message"]) == (400, "the file of this model has no vocabulary")
    assert daemon.request("/models/unload", {"model_id": "tiny"}) == (
        200,
        {"model_id": "tiny", "status": "unloaded"},
    )
    status, loaded = daemon.request("/models/load", {"model_id": "tiny", "source": str(GOLDEN), "wait": True})
    assert (status, loaded["status"]) == (200, "loaded")

    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(WAIT_S) == 0
    log = daemon.log.read_text()
    assert "msg=stopped" in log
    assert "Traceback" not in log


def test_a_taken_port_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "helexa.cli.neuron", "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 1
    assert f"error: cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr
    assert "Traceback" not in done.stderr
