"""`helexa keys`: what is shown, what is stored, and what is refused."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helexa.cli import app
from helexa.errors import BadRequest
from helexa.gateway.keys import MADE_KEY, digest, read_keys


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.toml"
    path.write_text("")
    return path


def keys(config: Path, *arguments: str) -> str:
    done = CliRunner().invoke(app, ["keys", *arguments, "--config", str(config)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_a_key_is_shown_once_and_stored_as_a_digest(config: Path) -> None:
    key = keys(config, "add", "ada").strip()
    assert MADE_KEY.fullmatch(key)
    path = config.parent / "keys.jsonl"
    (record,) = read_keys(path)
    assert bytes.fromhex(record.digest) == digest(key)
    assert key not in path.read_text() + keys(config, "list") + keys(config, "list", "--json")


def test_what_a_key_may_do_is_stored_and_listed(config: Path) -> None:
    limits = ("--requests", "60/m", "--tokens", "2M/d", "--tokens", "1000/12h")
    keys(config, "add", "ada", "-m", "qwen*", "-m", "tiny", *limits, "--priority", "-3", "--admin")
    (shown,) = json.loads(keys(config, "list", "--json"))
    assert {name: shown[name] for name in ("name", "models", "limits", "priority", "admin")} == {
        "name": "ada",
        "models": ["qwen*", "tiny"],
        "limits": ["60 requests per minute", "2000000 tokens per day", "1000 tokens per 12 hours"],
        "priority": -3,
        "admin": True,
    }
    assert "ada" in keys(config, "list")


def test_a_key_is_revoked_by_name_or_id(config: Path) -> None:
    for name in ("ada", "bob", "cy"):
        keys(config, "add", name)
    path = config.parent / "keys.jsonl"
    assert keys(config, "revoke", "bob") == "the key of bob is revoked\n"
    keys(config, "revoke", read_keys(path)[1].id)
    assert [record.name for record in read_keys(path)] == ["ada"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("add", "a b"), "'a b' is no name"),
        (("add", "x", "--tokens", "many"), "'many' is no limit; write amount/time"),
        (("add", "x", "--requests", "0/m"), "'0/m' is no limit"),
        (("add", "x", "--requests", "5/0m"), "'5/0m' is no limit"),
        (("add", "ada"), "there is a key named 'ada' already"),
        (("revoke", "nobody"), "there is no key 'nobody'"),
    ],
)
def test_a_mistake_changes_nothing(config: Path, arguments: tuple[str, ...], message: str) -> None:
    keys(config, "add", "ada")
    before = (config.parent / "keys.jsonl").read_bytes()
    with pytest.raises(BadRequest, match=message):
        keys(config, *arguments)
    assert (config.parent / "keys.jsonl").read_bytes() == before
