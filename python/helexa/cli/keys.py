"""`helexa keys`: the API keys of a gateway on this machine, which takes them over within a second."""

import time
from pathlib import Path
from typing import Annotated

import msgspec
import orjson
import typer
from rich.console import Console
from rich.table import Table

from helexa.cli.terminal import command_line
from helexa.gateway.config import load_config
from helexa.gateway.keys import MAX_PRIORITY, add_key, parse_limit, read_keys, revoke_key
from helexa.settings import find_config

app = command_line("Add, list and revoke the API keys of a gateway.")

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="gateway.toml of the gateway; if not given, the one in ~/.config/helexa or /etc/helexa, if any",
        show_default=False,
    ),
]


def keys_file(config: Path | None) -> Path:
    """Where the gateway with this configuration looks for its keys."""
    settings, _ = load_config(config or find_config("gateway.toml"))
    assert settings.auth.keys_file is not None  # load_config always says where
    return Path(settings.auth.keys_file)


@app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="whose key it is; shown in lists and logs")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="a model or pattern that it may use, all if none; may be repeated"
        ),
    ] = None,
    requests: Annotated[
        list[str] | None, typer.Option(help="most requests in a rolling time, as 60/m; may be repeated")
    ] = None,
    tokens: Annotated[
        list[str] | None, typer.Option(help="most tokens in a rolling time, as 2M/d; may be repeated")
    ] = None,
    priority: Annotated[
        int, typer.Option(min=-MAX_PRIORITY, max=MAX_PRIORITY, help="in the queues; the highest goes first")
    ] = 0,
    admin: Annotated[bool, typer.Option("--admin", help="It may also load and unload models.")] = False,
    config: Config = None,
) -> None:
    """Make a key and show it, once."""
    limits = [parse_limit("requests", text) for text in requests or ()]
    limits += [parse_limit("tokens", text) for text in tokens or ()]
    path = keys_file(config)
    key, record = add_key(path, name, models=model or (), limits=limits, priority=priority, admin=admin)
    typer.echo(key)
    typer.echo(f"This is the key of {record.name}, shown this once: {path} has only its digest.", err=True)


@app.command("list")
def show(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")] = False,
    config: Config = None,
) -> None:
    """List the keys, without the keys themselves."""
    records = read_keys(keys_file(config))
    if as_json:
        shown = [
            {**msgspec.structs.asdict(record), "limits": list(map(str, record.limits))} for record in records
        ]
        typer.echo(orjson.dumps(shown, option=orjson.OPT_INDENT_2).decode())
        return
    table = Table(box=None, header_style="bold")
    for column in ("NAME", "ID", "MADE", "MODELS", "LIMITS", "PRIORITY", "ADMIN"):
        table.add_column(column, justify="right" if column == "PRIORITY" else "left")
    for record in records:
        made = time.strftime("%Y-%m-%d", time.localtime(record.created_at))
        limits = ", ".join(str(limit) for limit in record.limits) or "none"
        models = ", ".join(record.models) or "all"
        is_admin = "yes" if record.admin else ""
        table.add_row(record.name, record.id, made, models, limits, str(record.priority), is_admin)
    Console().print(table)


@app.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(help="name or id of the key")],
    config: Config = None,
) -> None:
    """Remove a key: no new request with it is served; those that run may end."""
    record = revoke_key(keys_file(config), name)
    typer.echo(f"the key of {record.name} is revoked")
