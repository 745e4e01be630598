"""The table of commands, and what errors look like at the terminal."""

import subprocess
import sys

import pytest

from helexa import __version__
from helexa.cli.terminal import command_line, run_app
from helexa.errors import ConfigError

COMMANDS = {
    *("up", "status", "models", "load", "unload", "reload", "keys", "pull", "chat", "bench", "perplexity")
}


def helexa(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "helexa.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={"COLUMNS": "200", "PATH": "/bin"}
    )


def test_the_version_is_that_of_the_package() -> None:
    assert helexa("--version").stdout == f"helexa {__version__}\n"


def test_help_lists_every_command() -> None:
    text = helexa("--help").stdout
    assert {name for name in COMMANDS if f" {name} " in text} == COMMANDS


def test_an_error_is_one_sentence_on_stderr_and_status_1() -> None:
    done = helexa("status", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: nothing answers at http://127.0.0.1:9;")
    assert len(done.stderr.splitlines()) == 1


def test_an_error_is_shown_as_it_is_whatever_brackets_it_has(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "neuron.toml: unknown key 'x' in [engine]; pip install 'helexa[neuron]'"
    app = command_line()

    def fail() -> None:
        raise ConfigError(message)

    app.command()(fail)
    monkeypatch.setattr(sys, "argv", ["helexa"])
    with pytest.raises(SystemExit, match="1"):
        run_app(app)
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_wrong_option_is_refused_with_its_name() -> None:
    done = helexa("bench", "model.gguf", "--streams", "0")
    assert done.returncode == 2
    assert "--streams" in done.stderr
