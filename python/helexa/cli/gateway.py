"""`helexa-gateway`: the daemon that clients talk to."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from helexa import __version__
from helexa.cli.terminal import command_line, run_app
from helexa.gateway.app import serve
from helexa.gateway.auth import Keys
from helexa.gateway.config import load_config
from helexa.log import configure_logging
from helexa.settings import find_config

EPILOG = (
    "Without a configuration file the gateway serves the neuron at http://127.0.0.1:13131. An environment "
    "variable overrides any key: HELEXA_GATEWAY_LISTEN sets gateway.listen. The gateway stops on SIGINT or "
    "SIGTERM, after streams had time to end."
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"helexa-gateway {__version__}")
        raise typer.Exit


def run(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help="gateway.toml; if not given, the one in ~/.config/helexa or /etc/helexa, if any",
            show_default=False,
        ),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="host:port of the API (default 127.0.0.1:31313)", show_default=False)
    ] = None,
    metrics_listen: Annotated[
        str | None, typer.Option(help="host:port of /metrics (default 127.0.0.1:31314)", show_default=False)
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Validate the configuration and exit.")] = False,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """The front door of a fleet: one OpenAI-compatible API over every neuron of a site."""
    overrides: dict[str, object] = {"gateway.listen": listen, "gateway.metrics_listen": metrics_listen}
    path = config or find_config("gateway.toml")
    settings, catalogue = load_config(path, overrides)
    if check:
        settings.tls.check()
        Keys(settings)  # reads its file
        typer.echo(
            f"the configuration is valid: {len(settings.neurons)} neurons, {len(catalogue.models)} models"
        )
        return
    configure_logging(settings.log.level)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, catalogue, read=lambda: load_config(path, overrides)))


def main() -> None:
    """Runs the daemon; a wrong configuration is one sentence on stderr and exit status 1."""
    app = command_line()
    app.command(name="helexa-gateway", epilog=EPILOG)(run)
    run_app(app)


if __name__ == "__main__":
    main()
