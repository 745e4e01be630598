"""`helexa up`: a gateway and a neuron with one model on this machine, until Ctrl-C."""

import asyncio
import json
import os
import shlex
import signal
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from helexa.cli.children import Children
from helexa.cli.client import Client
from helexa.cli.load import progress_bar, wait_until_loaded
from helexa.cli.local import need_engine
from helexa.cli.pull import fetch
from helexa.errors import BadRequest, HelexaError

HOST = "127.0.0.1"
START_S = 60.0  # until a daemon answers at all; the load of the model has no limit
POLL_S = 0.1
QUESTION = "What is the capital of England?"


def state_folder() -> Path:
    """Where configuration and logs of `helexa up` lie: $XDG_STATE_HOME/helexa."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "helexa"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_port_is_free(port: int, option: str) -> None:
    """Raises BadRequest with what to do if something listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise BadRequest(
                f"port {port} of {HOST} cannot be used ({error.strerror}); stop what listens there, perhaps "
                f"another `helexa up`, or choose another with {option}"
            ) from None


def write_configuration(
    folder: Path, model: str, source: str, port: int, metrics_port: int, neuron_port: int
) -> None:
    """neuron.toml and gateway.toml for one model and both daemons on loopback."""
    quoted = json.dumps  # a JSON string is a TOML string
    (folder / "neuron.toml").write_text(
        f"[neuron]\nhost = {quoted(HOST)}\nport = {neuron_port}\n\n"
        f"[[models]]\nid = {quoted(model)}\nsource = {quoted(source)}\n",
        "utf-8",
    )
    (folder / "gateway.toml").write_text(
        f"[gateway]\nlisten = {quoted(f'{HOST}:{port}')}\n"
        f"metrics_listen = {quoted(f'{HOST}:{metrics_port}')}\n\n"
        f'[[neurons]]\nname = "local"\nendpoint = {quoted(f"http://{HOST}:{neuron_port}")}\n',
        "utf-8",
    )


async def wait_until_answering(client: Client, path: str) -> None:
    """Returns once GET `path` succeeds. Raises the last error after START_S."""
    deadline = asyncio.get_running_loop().time() + START_S
    while True:
        try:
            await client.get(path)
            return
        except HelexaError:
            if asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(POLL_S)


async def first_answer(client: Client, model: str) -> str:
    """The model's answer to a first question; the gateway may need a moment to know of the model."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 32,
        "temperature": 0,
        "reasoning_effort": "none",
    }
    deadline = asyncio.get_running_loop().time() + START_S
    while True:
        try:
            answer = await client.post("/v1/chat/completions", body)
            return str(answer["choices"][0]["message"]["content"] or "").strip()
        except HelexaError as error:
            if error.status not in (404, 503) or asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(POLL_S)


def instructions(url: str, model: str, answer: str, logs: Path) -> str:
    """What a user needs once everything runs."""
    message = {"role": "user", "content": QUESTION}
    request = {"model": model, "stream": True, "temperature": 0, "messages": [message]}
    return f"""
helexa is up: {url}   model: {model}
  asked: {QUESTION}
  answer: {answer}

try it
  curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d {shlex.quote(json.dumps(request))}
  helexa chat --url {url}

OpenAI clients
  base_url {url}/v1, model "{model}", any api_key; or in the environment:
  export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=none

Anthropic clients, Claude Code among them
  export ANTHROPIC_BASE_URL={url} ANTHROPIC_API_KEY=none

logs in {logs}; Ctrl-C stops everything
"""


async def _bring_up(
    children: Children, folder: Path, model: str, port: int, neuron_port: int, console: Console
) -> None:
    module = [sys.executable, "-m"]
    for name in ("neuron", "gateway"):
        command = [*module, f"helexa.cli.{name}", "--config", str(folder / f"{name}.toml")]
        await children.start(name, command, folder / f"{name}.log")
    url = f"http://{HOST}:{port}"
    async with Client(f"http://{HOST}:{neuron_port}") as neuron:
        with console.status("starting"):
            await wait_until_answering(neuron, "/version")
        with progress_bar(console) as bar:
            await wait_until_loaded(neuron, model, bar)
    async with Client(url, timeout_s=None) as gateway:
        with console.status("waiting for the first answer"):
            await wait_until_answering(gateway, "/health")
            answer = await first_answer(gateway, model)
    typer.echo(instructions(url, model, answer, folder))
    await asyncio.get_running_loop().create_future()  # until the task is cancelled


async def _supervise(folder: Path, model: str, port: int, neuron_port: int) -> None:
    """Runs until a signal, or until a child dies: then HelexaError says which and why."""
    console = Console(stderr=True)
    deaths: list[HelexaError] = []

    def on_death(error: HelexaError) -> None:
        deaths.append(error)
        work.cancel()

    children = Children(on_death)
    work = asyncio.create_task(_bring_up(children, folder, model, port, neuron_port, console))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        if deaths:
            raise deaths[0] from None
        console.print("stopping; Ctrl-C again stops at once", highlight=False)
    finally:
        stopping = asyncio.create_task(children.stop())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, stopping.cancel)
        await asyncio.wait([stopping])


def up(
    model: Annotated[
        str, typer.Argument(help="what `helexa pull` accepts: a name, org/repo, or a GGUF file")
    ] = "starter",
    port: Annotated[int, typer.Option(min=1, max=65535, help="of the gateway")] = 31313,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="of the gateway's metrics")] = 31314,
    neuron_port: Annotated[int, typer.Option(min=1, max=65535, help="of the neuron")] = 13131,
) -> None:
    """Fetch a model if needed, start gateway and neuron on loopback, and serve until Ctrl-C."""
    need_engine()
    for number, option in (
        (port, "--port"),
        (metrics_port, "--metrics-port"),
        (neuron_port, "--neuron-port"),
    ):
        check_port_is_free(number, option)
    path = fetch(model)
    if Path(model).exists():
        model = path.stem if path.is_file() else path.absolute().name
    folder = state_folder()
    write_configuration(folder, model, str(path), port, metrics_port, neuron_port)
    asyncio.run(_supervise(folder, model, port, neuron_port))
