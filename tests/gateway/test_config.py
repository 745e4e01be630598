"""gateway.toml."""

import pytest

from helexa.errors import ConfigError
from helexa.gateway.config import AuthSection, GatewayConfig, load_config, split_address
from helexa.serving import is_loopback


def write(folder, text, name="gateway.toml"):
    path = folder / name
    path.write_text(text)
    return path


def test_without_a_file_one_neuron_on_this_machine_is_served_on_loopback(monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", "/home/someone/.config")
    config, catalogue = load_config(None)
    assert config == GatewayConfig(auth=AuthSection(keys_file="/home/someone/.config/helexa/keys.jsonl"))
    assert (config.gateway.listen, config.gateway.metrics_listen) == ("127.0.0.1:31313", "127.0.0.1:31314")
    assert [neuron.endpoint for neuron in config.neurons] == ["http://127.0.0.1:13131"]
    assert not catalogue.models


def test_the_whole_file_is_read(tmp_path):
    write(tmp_path, '[[models]]\nid = "m"', "fleet.toml")
    path = write(
        tmp_path,
        """
        models_config = "fleet.toml"
        [gateway]
        listen = "0.0.0.0:80"
        max_body_bytes = 1000
        [eviction]
        strategy = "lru"
        [auth]
        keys = ["sk-0123456789"]
        [[neurons]]
        name = "beast"
        endpoint = "http://beast:13131"
        [[neurons]]
        name = "benjy"
        endpoint = "https://benjy:13131/"
        """,
    )
    config, catalogue = load_config(path)
    assert config.gateway.listen == "0.0.0.0:80"
    assert config.eviction.strategy == "lru"
    assert [neuron.name for neuron in config.neurons] == ["beast", "benjy"]
    assert list(catalogue.models) == ["m"]


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path, monkeypatch):
    path = write(tmp_path, '[gateway]\nlisten = "127.0.0.1:1"\nmetrics_listen = "127.0.0.1:2"')
    monkeypatch.setenv("HELEXA_GATEWAY_LISTEN", "127.0.0.1:3")
    monkeypatch.setenv("HELEXA_GATEWAY_METRICS_LISTEN", "127.0.0.1:4")
    config, _ = load_config(path, {"gateway.listen": "127.0.0.1:5", "gateway.metrics_listen": None})
    assert (config.gateway.listen, config.gateway.metrics_listen) == ("127.0.0.1:5", "127.0.0.1:4")


def test_the_keys_lie_beside_the_file_unless_it_says_where(tmp_path):
    path = write(tmp_path, "")
    assert load_config(path)[0].auth.keys_file == str(tmp_path / "keys.jsonl")
    path = write(tmp_path, '[auth]\nkeys_file = "secret/keys"')
    assert load_config(path)[0].auth.keys_file == str(tmp_path / "secret" / "keys")


def test_the_catalogue_beside_the_file_is_read_unasked(tmp_path, monkeypatch):
    write(tmp_path, '[[models]]\nid = "m"', "models.toml")
    monkeypatch.chdir("/")
    assert list(load_config(write(tmp_path, ""))[1].models) == ["m"]


def test_a_catalogue_that_is_named_must_exist(tmp_path):
    path = write(tmp_path, 'models_config = "nowhere.toml"')
    with pytest.raises(ConfigError, match=rf"{path}: models_config: no file at {tmp_path}/nowhere.toml"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gateway]\nlissten = 1", "unknown key 'gateway.lissten'; did you mean 'listen'"),
        ("[[nodes]]\nname = 'a'", "unknown key 'nodes'"),
        ("[[neurons]]\nname = 'a'", "missing key endpoint"),
        ("[gateway]\nlisten = 'here'", "'here' is not an address; write host:port"),
        ("[gateway]\nlisten = '127.0.0.1:99999'", "not an address"),
        ("[gateway]\nload_timeout_s = 0", "load_timeout_s must be positive, got 0"),
        ("[gateway]\nmax_body_bytes = 'many'", "gateway.max_body_bytes: expected int, got str"),
        ("[eviction]\nstrategy = 'random'", "eviction.strategy: invalid enum value 'random'"),
        ("[auth]\nkeys = ['short']", "fewer than 8 characters"),
        ("[[neurons]]\nname = 'a'\nendpoint = 'host:13131'", "must look like http://host:13131"),
        ("[[neurons]]\nname = 'a'\nendpoint = 'http://host/v1'", "must look like http://host:13131"),
        (2 * "[[neurons]]\nname = 'a'\nendpoint = 'http://host:1'\n", "two neurons are named 'a'"),
    ],
)
def test_a_mistake_is_told_with_file_and_key(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in caught.value.message
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:31313", ("127.0.0.1", 31313)),
        ("[::1]:80", ("::1", 80)),
        (":80", ("0.0.0.0", 80)),
        ("localhost:0", ("localhost", 0)),
    ],
)
def test_addresses(address, expected):
    assert split_address(address) == expected


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("10.1.1.1", False)],
)
def test_what_only_this_machine_can_reach(host, expected):
    assert is_loopback(host) is expected
