"""The `helexa` command: the table of its commands.

Nothing heavy is imported here; commands that drive the engine import it when they run.
"""

from collections.abc import Callable
from typing import Annotated

import typer

from helexa import __version__
from helexa.cli import bench, chat, keys, load, models, perplexity, pull, quantize, reload, status, up
from helexa.cli.terminal import command_line, run_app

app = command_line("Serve open-weight language models on your own machines.")


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
    "reload": reload.reload,
    "chat": chat.chat,
    "bench": bench.bench,
    "perplexity": perplexity.perplexity,
    "quantize": quantize.quantize,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(keys.app, name="keys")


def main() -> None:
    """Runs `helexa`."""
    run_app(app)
