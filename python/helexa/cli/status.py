"""`helexa status`: the fleet as its gateway sees it."""

import asyncio
from collections.abc import Iterator
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from helexa.cli.client import GATEWAY_URL, Client

_COLOURS = {
    "up": "green",
    "loaded": "green",
    "ok": "green",
    "loading": "cyan",
    "unloading": "cyan",
    "unloaded": "dim",
    "waiting": "cyan",
    "draining": "yellow",
    "suspect": "yellow",
    "tripped": "yellow",
    "impaired": "yellow",
}


async def fetch(url: str, key: str | None) -> dict[str, Any]:
    """The gateway's health and fleet in one document."""
    async with Client(url, key) as client:
        health, fleet = await asyncio.gather(client.get("/health"), client.get("/fleet"))
    return {"url": client.url, **health, **fleet, "summary": health["nodes"]}


def status(
    url: Annotated[str, typer.Option(help="the gateway", envvar="HELEXA_URL")] = GATEWAY_URL,
    key: Annotated[
        str | None, typer.Option(help="API key, where one is required", envvar="HELEXA_API_KEY")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")] = False,
) -> None:
    """Show nodes, devices, models and load."""
    report = asyncio.run(fetch(url, key))
    if as_json:
        typer.echo(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
        return
    render(report, Console())


def render(report: dict[str, Any], console: Console) -> None:
    """Prints the report as tables."""
    summary = report["summary"]
    heading = Text.assemble(
        f"{report['url']}  ",
        _coloured(report["status"]),
        f"  {summary['healthy']} of {summary['total']} nodes up",
    )
    console.print(heading)
    nodes = Table(box=None, header_style="bold")
    for column in ("NODE", "STATE", "ENDPOINT", "DEVICE", "MEMORY"):
        nodes.add_column(column)
    models = Table(box=None, header_style="bold")
    for column in ("MODEL", "NODE", "STATUS", "CONTEXT", "MEMORY", "RUNNING", "QUEUED", "TOK/S"):
        models.add_column(column, justify="left" if column in ("MODEL", "NODE", "STATUS") else "right")
    for node in report["nodes"]:
        for row in _device_rows(node):
            nodes.add_row(*row)
        for model in node["models"]:
            models.add_row(*_model_row(node, model))
    listed = {(model["id"], node["name"]) for node in report["nodes"] for model in node["models"]}
    for model, name in report["loading"].items():
        if (model, name) not in listed:
            models.add_row(model, name, _coloured("loading"), "", "", "", "", "")
    for model, claim in report.get("waiting", {}).items():
        models.add_row(model, claim["node"], _waiting(claim), "", "", "", str(claim["requests"]), "")
    console.print(nodes)
    if models.row_count:
        console.print(models)
    for item in report.get("unservable", ()):
        console.print(
            f"{item['model']} on {item['node']} is {item['reason']}: {item['detail'] or 'no detail'}",
            style="red",
        )


def _device_rows(node: dict[str, Any]) -> Iterator[tuple[str | Text, ...]]:
    where = (node["name"], _coloured(node["state"]), node["endpoint"])
    if not node["devices"]:
        yield (*where, node["error"] or "", "")
    for index, device in enumerate(node["devices"]):
        used = device["total_bytes"] - device["free_bytes"]
        memory = f"{_gib(used)} of {_gib(device['total_bytes'])} used"
        yield (*(where if index == 0 else ("", "", "")), f"{device['index']}: {device['name']}", memory)


def _model_row(node: dict[str, Any], model: dict[str, Any]) -> tuple[str | Text, ...]:
    load = model["load"] or {}
    state = _coloured(model["status"])
    if progress := model.get("progress"):
        state.append(f" {progress['percent']:.0f} % {progress['phase']}")
        if (remaining_s := progress.get("remaining_s")) is not None:
            state.append(f", {remaining_s:.0f} s left")
    seats = load.get("max_in_flight")
    running = str(load.get("in_flight", model["active"]))
    speed = load.get("tok_s_decode")
    return (
        model["id"],
        node["name"],
        state,
        str((model.get("limit") or {}).get("context", "")),
        _gib(model["memory_bytes"]) if model.get("memory_bytes") else "",
        f"{running} of {seats}" if seats else running,
        str(load.get("queue_depth", 0)),
        f"{speed:.1f}" if speed else "",
    )


def _waiting(claim: dict[str, Any]) -> Text:
    state = _coloured("waiting")
    state.append(f" {claim['seconds']:.0f} s for its turn")
    if claim["displaces"]:
        state.append(f", then {' and '.join(claim['displaces'])} must leave")
    return state


def _coloured(word: str) -> Text:
    return Text(word, style=_COLOURS.get(word, "red"))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
