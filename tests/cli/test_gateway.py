"""`helexa-gateway` as a command."""

import os
import subprocess
import sys

import pytest

from helexa import __version__


def run(*arguments, **more):
    command = [sys.executable, "-m", "helexa.cli.gateway", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **more)


def test_help_tells_the_options_and_the_defaults():
    result = run("--help", env={**os.environ, "COLUMNS": "160", "TERM": "dumb"})
    assert result.returncode == 0
    for word in (
        "--config",
        "--listen",
        "--metrics-listen",
        "--check",
        "127.0.0.1:31313",
        "HELEXA_GATEWAY_LISTEN",
    ):
        assert word in result.stdout
    assert __version__ in run("--version").stdout


def test_a_configuration_can_be_checked(tmp_path):
    (tmp_path / "models.toml").write_text('[[models]]\nid = "m"\n')
    config = tmp_path / "gateway.toml"
    config.write_text('[[neurons]]\nname = "a"\nendpoint = "http://a:13131"\n')
    assert (
        run("--check", "--config", str(config)).stdout == "the configuration is valid: 1 neurons, 1 models\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gateway]\nlisen = 1", "unknown key 'gateway.lisen'; did you mean 'listen'?"),
        (None, "cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_1(tmp_path, text, message):
    config = tmp_path / "gateway.toml"
    if text is not None:
        config.write_text(text)
    result = run("--config", str(config))
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {config}: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_check_reads_the_keys_and_the_certificates_too(tmp_path):
    config = tmp_path / "gateway.toml"
    config.write_text("")
    (tmp_path / "keys.jsonl").write_text("{")
    result = run("--check", "--config", str(config))
    assert (result.returncode, "keys.jsonl" in result.stderr) == (1, True)
    (tmp_path / "keys.jsonl").unlink()
    config.write_text('[tls]\ncert = "/nowhere.pem"\nkey = "/nowhere.key"\n')
    result = run("--check", "--config", str(config))
    assert (result.returncode, result.stderr) == (1, "error: tls: no file at /nowhere.pem\n")
