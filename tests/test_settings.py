"""Configuration: precedence, and errors that name file and key."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from helexa.errors import ConfigError
from helexa.settings import LogConfig, differences, find_config, load_settings, log_settings


@dataclass(frozen=True)
class Server:
    host: str = "127.0.0.1"
    port: int = 1
    ratio: float | None = None
    secret: str | None = field(default=None, metadata={"secret": True})
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be below 65536, not {self.port}")


@dataclass(frozen=True)
class Node:
    name: str
    weight: int = 1


@dataclass(frozen=True)
class Config:
    models_config: str = "models.toml"
    server: Server = Server()
    nodes: list[Node] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)


@pytest.fixture
def load(tmp_path: Path):
    def call(text: str, environ: dict[str, str] | None = None, **overrides: object) -> Config:
        path = tmp_path / "some.toml"
        path.write_text(text)
        return load_settings(Config, path, environ=environ or {}, overrides=overrides)

    return call


def test_without_a_file_the_defaults_hold():
    assert load_settings(Config, environ={}) == Config()


def test_a_file_fills_tables_arrays_and_maps(load):
    config = load('[server]\nport = 2\n[[nodes]]\nname = "a"\nweight = 3\n[aliases]\nsmall = "x/y"\n')
    assert config.server.port == 2
    assert config.nodes == [Node("a", 3)]
    assert config.aliases == {"small": "x/y"}


def test_the_command_line_beats_the_environment_which_beats_the_file(load):
    text, environ = "[server]\nport = 2\n", {"HELEXA_SERVER_PORT": "3", "HELEXA_MODELS_CONFIG": "other"}
    assert load(text, environ).server.port == 3
    assert load(text, environ).models_config == "other"
    assert load(text, environ, **{"server.port": 4}).server.port == 4
    assert load(text, environ, **{"server.port": None}).server.port == 3


def test_a_list_in_the_environment_is_split_at_commas(load):
    assert load("", {"HELEXA_SERVER_TAGS": "a, b,"}).server.tags == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[server]\nprot = 2", ["some.toml", "'server.prot'", "did you mean 'port'"]),
        ("[sevrer]\nport = 2", ["some.toml", "'sevrer'", "did you mean 'server'"]),
        ("zzz = 1", ["'zzz'", "known keys: aliases, models_config, nodes, server"]),
        ('[[nodes]]\nname = "a"\nwieght = 1', ["'nodes.wieght'", "did you mean 'weight'"]),
        ("[[nodes]]\nweight = 1", ["nodes[0]", "missing key name"]),
        ('[server]\nport = "x"', ["some.toml", "server.port", "expected int, got str"]),
        ("[server]\nport = 70000", ["server", "port must be below 65536, not 70000"]),
        ("server = 3", ["server", "expected object, got int"]),
        ("= 3", ["not valid TOML"]),
    ],
)
def test_a_wrong_file_is_an_error_that_names_file_and_key(load, text, parts):
    with pytest.raises(ConfigError) as caught:
        load(text)
    for part in parts:
        assert part in caught.value.message


def test_a_wrong_environment_value_is_an_error_that_names_the_variable(load):
    with pytest.raises(ConfigError, match=r"HELEXA_SERVER_PORT='many': expected int"):
        load("", {"HELEXA_SERVER_PORT": "many"})


def test_an_environment_value_for_a_table_that_is_no_table_is_an_error(load):
    with pytest.raises(ConfigError, match="'server' must be a table"):
        load("server = 3", {"HELEXA_SERVER_PORT": "4"})


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        load_settings(Config, tmp_path / "none.toml", environ={})


def test_the_users_configuration_folder_is_found(tmp_path):
    (tmp_path / "helexa").mkdir()
    (tmp_path / "helexa" / "some.toml").touch()
    assert find_config("some.toml", {"XDG_CONFIG_HOME": str(tmp_path)}) == tmp_path / "helexa" / "some.toml"
    assert find_config("other.toml", {"XDG_CONFIG_HOME": str(tmp_path)}) is None


def test_the_effective_configuration_is_logged_without_secrets(caplog):
    with caplog.at_level(logging.INFO):
        log_settings(Config(server=Server(secret="hush"), nodes=[Node("a")]))
    (record,) = caplog.records
    assert record.fields["server.port"] == 1
    assert record.fields["nodes.a.name"] == "a"
    assert record.fields["server.secret"] == "***"


def test_an_unknown_log_level_is_refused():
    with pytest.raises(ValueError, match="level 'loud' is unknown"):
        LogConfig(level="loud")


def test_differences_name_what_is_new_gone_or_other_and_mask_secrets():
    before = Config(server=Server(port=1, secret="one", ratio=1.0), nodes=[Node("a"), Node("b")])
    after = Config(server=Server(port=2, secret="two"), nodes=[Node("b"), Node("c", 3)])
    assert differences(before, before) == {}
    assert differences(before, after) == {
        "server.port": (1, 2),
        "server.ratio": (1.0, None),
        "server.secret": ("***", "***"),
        "nodes.a.name": ("a", None),
        "nodes.a.weight": (1, None),
        "nodes.c.name": (None, "c"),
        "nodes.c.weight": (None, 3),
    }
