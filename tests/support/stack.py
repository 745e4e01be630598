"""Gateway and neuron as real processes, and what may be seen of them from outside."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import openai
import pytest

from helexa.cli.up import write_configuration

WAIT_S = 120.0
T = TypeVar("T")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


def get_text(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def wait_for(condition: Callable[[], T], what: str, wait_s: float = WAIT_S) -> T:
    """What `condition` returns once it is true; refused connections count as not yet."""
    deadline = time.monotonic() + wait_s
    found: Any = None
    while time.monotonic() < deadline:
        try:
            if found := condition():
                return found
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            found = error
        time.sleep(0.05)
    pytest.fail(f"{what} did not happen within {wait_s:.0f} s; the last look gave {found!r}")


@dataclass
class Daemon:
    """One process, which can be killed, frozen and started again."""

    name: str
    folder: Path
    url: str
    environ: dict[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def log(self) -> str:
        return (self.folder / f"{self.name}.log").read_text()

    @property
    def running(self) -> "subprocess.Popen[bytes]":
        assert self.process is not None
        return self.process

    def start(self) -> None:
        command = [
            *(sys.executable, "-m", f"helexa.cli.{self.name}"),
            *("--config", str(self.folder / f"{self.name}.toml")),
        ]
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, **self.environ}
            )

    def kill(self) -> None:
        self.running.kill()
        self.running.wait()

    def freeze(self) -> None:
        """The kernel still accepts its connections and nobody answers, as with a half-open connection."""
        self.running.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.running.send_signal(signal.SIGCONT)

    def stop(self) -> int:
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        return self.process.wait(60)

    def num_files(self) -> int:
        """Open files and connections."""
        return len(os.listdir(f"/proc/{self.running.pid}/fd"))


@dataclass
class Stack:
    """A running gateway with one neuron."""

    gateway: Daemon
    neuron: Daemon
    metrics_url: str
    model: str
    client: openai.OpenAI  # of the gateway

    @property
    def url(self) -> str:
        return self.gateway.url

    @property
    def neuron_url(self) -> str:
        return self.neuron.url

    def is_loaded(self) -> bool:
        return any(model["loaded"] for model in get(f"{self.url}/v1/models")["data"])

    def came_up(self) -> bool:
        """Like is_loaded, while both processes are to be alive."""
        for daemon in (self.gateway, self.neuron):
            if daemon.running.poll() is not None:
                pytest.fail(f"{daemon.name} ended:\n{daemon.log}")
        return self.is_loaded()

    def load(self) -> dict[str, Any]:
        """The load of the model as the neuron tells it."""
        return next(
            (
                dict(model)
                for model in get(f"{self.neuron_url}/health")["models"]
                if model["id"] == self.model
            ),
            {},
        )

    def is_at_rest(self) -> bool:
        """Whether nothing runs, waits or holds pages of the KV cache."""
        load = self.load()
        return bool(load) and not any(
            load.get(name, 0) for name in ("in_flight", "queue_depth", "kv_tokens_used")
        )

    def num_tasks(self, daemon: Daemon) -> int:
        """Of its event loop, as its metrics tell."""
        is_gateway = daemon is self.gateway
        text = get_text(self.metrics_url if is_gateway else f"{self.neuron_url}/metrics")
        found = re.search(rf"^helexa_{'' if is_gateway else 'neuron_'}tasks (\S+)$", text, re.MULTILINE)
        assert found is not None
        return int(float(found[1]))

    def ask(self, text: str = "What is the capital of England?", **options: Any) -> Any:
        """A whole answer through the gateway."""
        asked: dict[str, Any] = {"model": self.model, "temperature": 0, "max_tokens": 12, **options}
        return self.client.chat.completions.create(messages=[{"role": "user", "content": text}], **asked)


@contextmanager
def running_stack(
    folder: Path,
    model: Path,
    *,
    neuron: str = "",
    gateway: str = "",
    wait: bool = True,
    environ: dict[str, str] | None = None,
) -> Iterator[Stack]:
    """A stack with the model; `neuron` and `gateway` are further lines of their configuration files.

    environ: of both processes, beside that of the tests.
    """
    port, metrics_port, neuron_port = free_port(), free_port(), free_port()
    write_configuration(folder, "starter", str(model), port, metrics_port, neuron_port)
    for name, lines in (("neuron", neuron), ("gateway", gateway)):
        path = folder / f"{name}.toml"
        path.write_text(_merged(path.read_text("utf-8"), lines), "utf-8")
    stack = Stack(
        Daemon("gateway", folder, f"http://127.0.0.1:{port}", environ or {}),
        Daemon("neuron", folder, f"http://127.0.0.1:{neuron_port}", environ or {}),
        f"http://127.0.0.1:{metrics_port}/metrics",
        "starter",
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0),
    )
    stack.neuron.start()
    stack.gateway.start()
    try:
        if wait:
            wait_for(stack.came_up, "the load")
        yield stack
    finally:
        stack.client.close()
        stack.neuron.stop()
        code = stack.gateway.stop()
    assert code in (0, -signal.SIGKILL), stack.gateway.log


def _merged(text: str, lines: str) -> str:
    """The file with lines added; those of a section that is there already go into it."""
    for section in re.split(r"^(?=\[)", lines, flags=re.MULTILINE):
        header, _, body = section.partition("\n")
        if header and not header.startswith("[["):
            found = f"{header}\n"
            text = text.replace(found, found + body + "\n", 1) if found in text else f"{text}\n{section}\n"
        elif header:
            text += f"\n{section}\n"
    return text
