"""models.toml."""

import pytest

from helexa.errors import ConfigError
from helexa.gateway.catalogue import Catalogue, Cost, Limit, ModelEntry, load_catalogue


def write(folder, text):
    path = folder / "models.toml"
    path.write_text(text)
    return path


def test_an_entry_with_everything(tmp_path):
    path = write(
        tmp_path,
        """
        [[models]]
        id = "Qwen/Qwen3.6-27B"
        source = "huggingface"
        quant = "Q6_K"
        vram_mb = 24000
        min_devices = 2
        min_device_vram_mb = 30000
        pinned_on = ["beast"]
        capabilities = ["text"]
        limit = { context = 65536, output = 8192 }
        cost = { input = 0.5, output = 1.5, cache_read = 0.0 }
        [aliases]
        "helexa/large" = "Qwen/Qwen3.6-27B"
        """,
    )
    catalogue = load_catalogue(path)
    entry = catalogue.models["Qwen/Qwen3.6-27B"]
    assert entry.limit == Limit(65536, output=8192)
    assert entry.cost == Cost(0.5, 1.5, cache_read=0.0)
    assert catalogue.resolve("helexa/large") == entry.id
    assert catalogue.resolve("anything else") == "anything else"


@pytest.mark.parametrize(
    ("entry", "source"),
    [
        (ModelEntry("a/b"), None),
        (ModelEntry("a/b", path="/models/b.gguf"), "/models/b.gguf"),
        (ModelEntry("b", name="starter"), "starter"),
        (ModelEntry("a/b", quant="Q4_K_M"), "a/b:Q4_K_M"),
        (ModelEntry("b", name="a/b", quant="Q4_K_M"), "a/b:Q4_K_M"),
        (ModelEntry("a/b", source="mirror"), "mirror:a/b"),
    ],
)
def test_what_a_neuron_is_told_to_load(entry, source):
    request = entry.load_request()
    assert (request.model_id, request.source, request.wait) == (entry.id, source, True)


def test_what_is_at_a_path_is_quantized_while_it_loads():
    request = ModelEntry("m", path="/models/m", quant="q4_k_m").load_request()
    assert (request.source, request.options.quant) == ("/models/m", "q4_k_m")


@pytest.mark.parametrize(
    ("entry", "rank"),
    [
        (ModelEntry("m"), 100),
        (ModelEntry("m", pinned_on=("a",)), 1000),
        (ModelEntry("m", pinned_on=("a",), residency_priority=7), 7),
    ],
)
def test_a_pinned_model_is_of_a_high_class_unless_told_otherwise(entry, rank):
    assert entry.rank == rank
    assert Catalogue({"m": entry}).rank("m") == rank
    assert Catalogue().rank("m") == 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[models]]\nid = ''", "a model's id must not be empty"),
        ("[[models]]\nquant = 'q8_0'", "missing key id"),
        (2 * "[[models]]\nid = 'm'\n", "'m' is listed twice"),
        ("[[models]]\nid = 'm'\nvram = 1", "unknown key 'models.vram'; did you mean 'vram_mb'"),
        ("[[models]]\nid = 'm'\npath = 'x'\nname = 'y'", "path excludes name and source"),
        ("[[models]]\nid = 'm'\nmin_devices = 0", "min_devices must be at least 1"),
        ("[[models]]\nid = 'm'\n[aliases]\nm = 'x'", "aliases.m: a model has this id"),
        ("[aliases]\na = 'b'\nb = 'c'", "aliases.a: 'b' is an alias itself"),
    ],
)
def test_a_mistake_is_told_with_file_and_key(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_catalogue(path)
    assert str(path) in caught.value.message
    assert message in caught.value.message
