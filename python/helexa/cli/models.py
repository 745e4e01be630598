"""`helexa models`: the models in the cache."""

import importlib.util
import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from helexa.errors import InvalidFile
from helexa.weights.sources import ModelEntry, list_models, models_folder


def models_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the models in the cache: name, size, architecture, quantization, context length."""
    rows = [_row(entry) for entry in list_models()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo(f"no models in {models_folder()}; `helexa pull starter` fetches a small one")
        return
    table = Table("name", "size", "architecture", "quantization", "context", box=None)
    for row in rows:
        cells = [row["architecture"], row["quantization"], row["context_length"]]
        shown = [str(cell or "?") for cell in cells]
        table.add_row(
            row["name"], _size(row["size_bytes"]), *(["[red]broken[/red]"] if row["error"] else shown)
        )
    Console().print(table)


def _row(entry: ModelEntry) -> dict[str, Any]:
    """What is known of a model: all that its header says where the engine's packages are installed."""
    row: dict[str, Any] = {"name": entry.name, "path": str(entry.path), "size_bytes": entry.size_bytes}
    row |= {"architecture": None, "quantization": None, "context_length": None, "error": None}
    if importlib.util.find_spec("numpy") is None:
        return row
    from helexa.weights.facts import describe

    try:
        facts = describe(entry.path)
    except InvalidFile as error:
        return row | {"error": error.message}
    return row | {
        "architecture": facts.architecture,
        "quantization": facts.quantization,
        "context_length": facts.context_length or None,
    }


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"
