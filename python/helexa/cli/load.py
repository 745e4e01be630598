"""`helexa load` and `helexa unload`: which models a neuron holds in memory."""

import asyncio
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from helexa.cli.client import GATEWAY_URL, Client, Key
from helexa.errors import HelexaError, UnknownModel

POLL_S = 0.3

Url = Annotated[str, typer.Option(help="gateway, which knows its neurons, or a neuron", envvar="HELEXA_URL")]
Node = Annotated[str | None, typer.Option(help="which of the gateway's neurons, where there are several")]


def progress_bar(console: Console | None = None) -> Progress:
    """A bar with phase and percent, gone when done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    return Progress(*columns, TimeElapsedColumn(), console=console or Console(stderr=True), transient=True)


async def model_info(client: Client, model: str, node: str | None = None) -> dict[str, Any] | None:
    """The entry of a neuron for the model, None when it does not know it; `node`: as its gateway shows it."""
    if node is None:
        entries = await client.get("/models")
    else:
        nodes = (await client.get("/fleet"))["nodes"]
        entries = next((entry["models"] for entry in nodes if entry["name"] == node), [])
    return next((entry for entry in entries if entry["id"] == model), None)


async def wait_until_loaded(
    client: Client, model: str, bar: Progress, node: str | None = None
) -> dict[str, Any]:
    """The model's entry once it is loaded, its progress shown until then. Raises HelexaError if it fails."""
    task = bar.add_task(f"loading {model}", total=100)
    while True:
        info = await model_info(client, model, node)
        if info is None:
            raise UnknownModel(f"{node or f'the neuron at {client.url}'} has no model {model!r}")
        if info["status"] == "loaded":
            bar.update(task, completed=100)
            return info
        if info["status"] != "loading":
            error = info.get("error") or {}
            raise HelexaError(
                f"{model} is {info['status']}: {error.get('message', 'the log of the neuron has the reason')}"
            )
        progress = info.get("progress") or {"phase": "queued", "percent": 0}
        bar.update(task, completed=progress["percent"], description=f"loading {model}: {progress['phase']}")
        await asyncio.sleep(POLL_S)


async def _load(client: Client, body: dict[str, Any]) -> None:
    told = await client.post("/models/load", body)
    model, node = told["id"], told.get("node")  # a gateway resolves aliases and says where
    with progress_bar() as bar:
        info = await wait_until_loaded(client, model, bar, node)
    context = (info.get("limit") or {}).get("context")
    seconds = f" in {info['load_seconds']:.1f} s" if info.get("load_seconds") is not None else ""
    typer.echo(
        f"{model} is loaded{f' on {node}' if node else ''}{seconds}"
        + (f", context {context} tokens" if context else "")
    )


def load(
    model: Annotated[str, typer.Argument(help="the name that requests will use")],
    source: Annotated[
        str | None, typer.Option(help="path or name to load from, if not the model's own name")
    ] = None,
    max_context: Annotated[int | None, typer.Option(min=1, help="longest sequence in tokens")] = None,
    max_sequences: Annotated[
        int | None, typer.Option(min=1, help="sequences decoded at the same time")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:0, ... or auto")] = None,
    quant: Annotated[
        str | None,
        typer.Option(help="quantize a model in F32, F16 or BF16 while it loads: q4_k_m, q8_0, ..."),
    ] = None,
    url: Url = GATEWAY_URL,
    key: Key = None,
    node: Node = None,
) -> None:
    """Load a model into a neuron; loading a loaded model again is fine."""
    options = {"device": device, "max_context": max_context, "max_sequences": max_sequences, "quant": quant}
    given = {name: value for name, value in options.items() if value is not None}
    body = {"model_id": model, "source": source, "options": given, "node": node}

    async def run() -> None:
        async with Client(url, key) as client:
            await _load(client, {name: value for name, value in body.items() if value is not None})

    asyncio.run(run())


def unload(
    model: Annotated[str, typer.Argument(help="a loaded model")],
    url: Url = GATEWAY_URL,
    key: Key = None,
    node: Node = None,
) -> None:
    """Free a model's memory; requests that are running may finish first."""

    async def run() -> None:
        async with Client(url, key, timeout_s=None) as client:
            await client.post("/models/unload", {"model_id": model} | ({"node": node} if node else {}))

    asyncio.run(run())
    typer.echo(f"{model} is unloaded")
