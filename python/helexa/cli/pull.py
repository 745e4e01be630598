"""`helexa pull`: fetch a model into the cache."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from helexa.weights.sources import pull


def fetch(name: str, console: Console | None = None) -> Path:
    """The file of a model, fetched first if need be with a progress bar on stderr. Raises SourceError."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console or Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None, visible=False)

        def report(phase: str, done_bytes: int, total_bytes: int) -> None:
            words = "waiting for another download of" if phase == "waiting" else phase
            total = total_bytes or None
            bar.update(task, description=f"{words} {name}", completed=done_bytes, total=total, visible=True)

        return pull(name, report)


def pull_command(
    name: Annotated[
        str, typer.Argument(help="'starter', ORG/REPO or ORG/REPO:QUANT of the HuggingFace hub, or a file")
    ] = "starter",
) -> None:
    """Fetch a model into the cache, go on where an earlier fetch was cut off, and print its path."""
    typer.echo(fetch(name))
