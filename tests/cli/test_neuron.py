"""Arguments of `helexa-neuron`."""

import sys

import pytest

from helexa.cli.neuron import load_config, main
from helexa.engine.device import check_device_name
from helexa.errors import ConfigError, HelexaError


@pytest.fixture
def run_main(monkeypatch, capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["helexa-neuron", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return ended.value.code or 0, shown.out, shown.err

    return call


@pytest.mark.parametrize(
    ("argument", "model_id", "source"),
    [
        ("a=/m/x.gguf", "a", "/m/x.gguf"),
        ("/m/x.gguf", "x", "/m/x.gguf"),
        ("/m/Tiny-1B", "Tiny-1B", "/m/Tiny-1B"),
        ("./m/Tiny-1B/", "Tiny-1B", "./m/Tiny-1B/"),
        ("starter", "starter", "starter"),
        ("small=org/repo:Q8_0", "small", "org/repo:Q8_0"),
    ],
)
def test_models_are_named_by_id_path_or_name(argument, model_id, source):
    (entry,) = load_config(None, models=[argument]).models
    assert (entry.id, entry.source) == (model_id, source)


@pytest.mark.parametrize("argument", ["=x", "a=", "", " "])
def test_a_model_without_id_or_source_is_refused(argument):
    with pytest.raises(ConfigError, match="must be ID=PATH"):
        load_config(None, models=[argument])


def test_the_command_line_beats_the_file(tmp_path):
    path = tmp_path / "neuron.toml"
    path.write_text('[neuron]\nport = 1\nhost = "::1"\n[[models]]\nid = "a"\nmax_context = 64\n')
    config = load_config(path, port=2)
    assert (config.neuron.port, config.neuron.host) == (2, "::1")
    assert (config.models[0].id, config.models[0].max_context) == ("a", 64)
    assert [entry.id for entry in load_config(path, models=["b"]).models] == ["b"]


def test_the_command_line_says_where_models_run_that_are_not_told_otherwise(tmp_path):
    path = tmp_path / "neuron.toml"
    path.write_text('[engine]\ndevice = "cuda"\n[[models]]\nid = "a"\n[[models]]\nid = "b"\ndevice = "cpu"\n')
    assert load_config(path).engine.device == "cuda"
    config = load_config(path, device="cuda:1")
    assert config.engine.options.device == "cuda:1"
    assert [entry.options.device for entry in config.models] == [None, "cpu"]


@pytest.mark.parametrize(
    "name", ["cpu", "cuda", "cuda:0", "cuda:12", "auto", "gpu", "cuda:", "cuda:x", "CPU", ""]
)
def test_a_device_is_refused_at_start_just_when_the_engine_would(run_main, name):
    try:
        check_device_name(name)
    except HelexaError:
        code, _, errors = run_main("--device", name, "--check")
        assert code == 1
        assert f"engine: device must be cpu, cuda:0, cuda:1, ... or auto, not {name!r}" in errors
    else:
        assert run_main("--device", name, "--check")[0] == 0


def test_check_says_whether_the_configuration_is_valid(run_main, tmp_path):
    path = tmp_path / "neuron.toml"
    path.write_text("[admission]\nmax_queue_depth = -1\n")
    code, _, errors = run_main("--config", str(path), "--check")
    assert code == 1
    assert "neuron.toml: admission: max_queue_depth must not be negative" in errors
    path.write_text("[admission]\nmax_queue_deth = 1\n")
    code, _, errors = run_main("--config", str(path), "--check")
    assert "unknown key 'admission.max_queue_deth'; did you mean 'max_queue_depth'?" in errors
    path.write_text('[[models]]\nid = "a"\n')
    assert run_main("--config", str(path), "--check")[:2] == (0, "the configuration is valid: 1 models\n")


def test_help_names_every_option(run_main):
    code, out, _ = run_main("--help")
    assert code == 0
    for option in ("--config", "--host", "--port", "--model", "--device", "--check", "--version", "13131"):
        assert option in out
