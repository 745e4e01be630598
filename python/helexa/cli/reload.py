"""`helexa reload`: a running gateway reads its configuration again."""

import asyncio
from typing import Annotated, Any

import typer

from helexa.cli.client import GATEWAY_URL, Client, Key


async def _reload(url: str, key: str | None) -> dict[str, Any]:
    async with Client(url, key) as client:
        report: dict[str, Any] = await client.post("/reload", {})
        return report


def reload(
    url: Annotated[str, typer.Option(help="the gateway", envvar="HELEXA_URL")] = GATEWAY_URL,
    key: Key = None,
) -> None:
    """Have a gateway read its files again; it goes on as it is if they are wrong."""
    report = asyncio.run(_reload(url, key))
    for name, (before, after) in report["changed"].items():
        note = "  (needs a restart)" if name in report["needs_restart"] else ""
        typer.echo(f"{name}: {_shown(before)} -> {_shown(after)}{note}")
    if not report["changed"]:
        typer.echo("nothing has changed")


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)
