"""The `helexa` command: the table of its commands.

Nothing heavy is imported here; commands that drive the engine import it when they run.
"""

import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from helexa import __version__
from helexa.cli import bench, chat, load, models, perplexity, pull, status, up
from helexa.errors import HelexaError

app = typer.Typer(
    name="helexa",
    help="Serve open-weight language models on your own machines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"helexa {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Serve open-weight language models on your own machines."""


COMMANDS: dict[str, Callable[..., None]] = {
    "up": up.up,
    "status": status.status,
    "pull": pull.pull_command,
    "models": models.models_command,
    "load": load.load,
    "unload": load.unload,
    "chat": chat.chat,
    "bench": bench.bench,
    "perplexity": perplexity.perplexity,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """Runs the command line; errors meant for the user are one sentence on stderr and exit status 1."""
    try:
        app()
    except HelexaError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {error.message}", highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
