"""`helexa-neuron`: the daemon of one host, which holds models and answers for them."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from helexa import __version__
from helexa.cli.local import need_engine
from helexa.cli.terminal import command_line, run_app
from helexa.errors import ConfigError
from helexa.log import configure_logging
from helexa.neuron.config import NeuronConfig
from helexa.settings import find_config, load_settings

EPILOG = (
    "An environment variable overrides any key of the configuration: HELEXA_NEURON_PORT sets neuron.port. "
    "SIGINT and SIGTERM stop the neuron when running requests had time to end; a second one stops it at once."
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"helexa-neuron {__version__}")
        raise typer.Exit


def load_config(
    path: Path | None,
    host: str | None = None,
    port: int | None = None,
    models: list[str] | None = None,
    device: str | None = None,
) -> NeuronConfig:
    """The effective configuration; `models`, as ID=SOURCE or a source alone, replace those of the file."""
    overrides: dict[str, object] = {"neuron.host": host, "neuron.port": port, "engine.device": device}
    if models:
        overrides["models"] = [_entry(model) for model in models]
    return load_settings(NeuronConfig, path, overrides=overrides)


def _entry(argument: str) -> dict[str, str]:
    model_id, separator, source = argument.partition("=")
    if not separator:
        model_id, source = argument, argument
        if argument.endswith(".gguf"):
            model_id = Path(argument).stem
        elif argument.startswith(("/", "./", "../", "~")):  # a directory
            model_id = Path(argument).name
    if not model_id.strip() or not source.strip():
        raise ConfigError(f"--model {argument!r} must be ID=PATH, ID=NAME, a path or a name")
    return {"id": model_id.strip(), "source": source.strip()}


def run(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help="neuron.toml; if not given, the one in ~/.config/helexa or /etc/helexa, if any",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="address to listen on; anything but loopback is open to others (default 127.0.0.1)"
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", "-p", help="port to listen on (default 13131)")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="ID=PATH|NAME",
            help="model to load at start, instead of those of the configuration; may be repeated. A path or "
            "name without ID= is served under the file's or its own name.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="cpu|cuda:N|auto",
            help="where models run that are not told otherwise (default auto: the first CUDA device with "
            "room for a model, else the CPU)",
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Validate the configuration and exit.")] = False,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Serve the models of this host over HTTP: OpenAI chat and completions, health, load and unload."""
    settings = load_config(config or find_config("neuron.toml"), host, port, model, device)
    if check:
        typer.echo(f"the configuration is valid: {len(settings.models)} models")
        return
    need_engine()
    configure_logging(settings.log.level)
    from helexa.neuron.app import serve

    asyncio.run(serve(settings))


def main() -> None:
    """Runs the daemon; a wrong configuration is one sentence on stderr and exit status 1."""
    app = command_line()
    app.command(name="helexa-neuron", epilog=EPILOG)(run)
    run_app(app)


if __name__ == "__main__":
    main()
