"""How every command line of helexa is built and ends."""

import sys

import typer
from rich.console import Console
from rich.text import Text

from helexa.errors import HelexaError


def command_line(help: str | None = None) -> typer.Typer:
    """An empty command line in the common style."""
    return typer.Typer(
        help=help,
        add_completion=False,
        no_args_is_help=help is not None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def show_error(error: HelexaError, console: Console) -> None:
    """Prints the message as it is, square brackets included."""
    console.print(Text.assemble(("error: ", "red"), error.message), soft_wrap=True, highlight=False)


def run_app(app: typer.Typer) -> None:
    """Runs the command line; an error meant for the user is one sentence on stderr and exit status 1."""
    try:
        app()
    except HelexaError as error:
        show_error(error, Console(stderr=True))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
