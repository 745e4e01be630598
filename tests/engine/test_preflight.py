"""What a load will need, known before weights are read."""

import numpy as np
import pytest

from helexa import ops
from helexa.engine import device, preflight
from helexa.engine.device import Device
from helexa.engine.engine import Engine
from helexa.engine.options import EngineOptions
from helexa.engine.preflight import check_memory, main_memory_tables, weight_nbytes
from helexa.errors import InvalidParameter, OutOfMemory
from helexa.models import config_from_gguf
from helexa.weights.model_file import open_model
from support.hf_checkpoint import GOLDEN

CASES = ["qwen3", "qwen3moe", "qwen35_tied"]


@pytest.fixture
def free(monkeypatch):
    """Sets the memory that is free."""
    return lambda nbytes: monkeypatch.setattr(device, "available_bytes", lambda: nbytes)


def check(case, **options):
    with open_model(GOLDEN / f"{case}.gguf") as file:
        config = config_from_gguf(file.metadata, file.tensors)
        return check_memory(file.tensors, config, EngineOptions(**options))


def least(case, free, **options):
    """The bytes that suffice, as the refusal of a byte less says."""
    free(0)
    with pytest.raises(OutOfMemory) as caught:
        check(case, **options)
    return caught.value.extra["missing_bytes"]


@pytest.mark.parametrize("case", CASES)
def test_the_missing_bytes_are_those_that_make_it_fit(case, free):
    for options in ({}, {"max_context": 600}, {"kv_cache_tokens": 5000, "max_sequences": 9}):
        enough = least(case, free, **options)
        free(enough)
        assert check(case, **options) > 0
        free(enough - 1)
        with pytest.raises(OutOfMemory, match="need 1 bytes more than the"):
            check(case, **options)
        free(enough + 99)
        with pytest.raises(OutOfMemory):
            check(case, reserved_bytes=100, **options)


@pytest.mark.parametrize("case", CASES)
def test_what_passes_loads_and_takes_what_was_said(case):
    path = GOLDEN / f"{case}.gguf"
    with Engine.load(path, max_context=512, num_threads=1) as engine, open_model(path) as file:
        assert engine.weight_bytes == weight_nbytes(file.tensors, Device("cpu"))


def test_states_of_recurrent_layers_count_for_every_sequence(free):
    one, five = (least("qwen35_tied", free, max_sequences=count) for count in (1, 5))
    assert five > one
    assert least("qwen3", free, max_sequences=1) == least("qwen3", free, max_sequences=5)


def test_the_refusal_says_which_context_fits(free):
    free(least("qwen3", free, max_context=512) + 1)
    with pytest.raises(OutOfMemory, match="a context of 512 tokens fits"):
        check("qwen3", max_context=1024)
    free(1000)
    with pytest.raises(OutOfMemory, match="no context fits"):
        check("qwen3")


def test_a_load_that_cannot_fit_reads_no_weights(free, monkeypatch):
    free(1 << 10)
    monkeypatch.setattr("helexa.engine.engine.read_model", lambda *_: pytest.fail("read"))
    with pytest.raises(OutOfMemory, match="bytes of weights"):
        Engine.load(GOLDEN / "qwen3.gguf")


def test_a_quantized_load_needs_less(free):
    with open_model(GOLDEN / "qwen3.gguf") as file:
        plain = weight_nbytes(file.tensors, Device("cpu"))
    with Engine.load(GOLDEN / "qwen3.gguf", quant="Q8_0", quant_cache=False, max_context=512) as engine:
        assert engine.weight_bytes < plain


def test_an_unknown_recipe_is_refused_before_the_file_is_opened():
    with pytest.raises(InvalidParameter, match="quant is 'q4_k_x'; did you mean q4_k"):
        Engine.load("no such file", quant="q4_k_x")


@pytest.mark.cuda
def test_an_embedding_that_is_only_looked_up_takes_nothing_of_a_device(cuda_device):
    path = GOLDEN / "qwen3.gguf"
    options = {} if cuda_device == "cpu" else {"device": cuda_device}
    with Engine.load(path, max_context=512, **options) as engine, open_model(path) as file:
        table = file.tensors["token_embd.weight"]
        placed = ops.packed_nbytes(table.format, *table.shape, engine.device.tensors)
        assert engine.weight_bytes == weight_nbytes(file.tensors, engine.device) - placed


@pytest.mark.cuda
def test_an_embedding_goes_to_the_device_if_its_head_shares_it_or_main_memory_lacks_room(
    cuda_device, monkeypatch
):
    there = Device(cuda_device)
    with open_model(GOLDEN / "qwen3.gguf") as file, open_model(GOLDEN / "qwen35_tied.gguf") as tied:
        config, tied_config = (config_from_gguf(one.metadata, one.tensors) for one in (file, tied))
        assert not main_memory_tables(tied.tensors, tied_config, there)
        assert main_memory_tables(file.tensors, config, there) == {"token_embd.weight"}
        needed = 2 * file.tensors["token_embd.weight"].nbytes
        monkeypatch.setattr(preflight, "available_bytes", lambda: needed)
        assert main_memory_tables(file.tensors, config, there)
        monkeypatch.setattr(preflight, "available_bytes", lambda: needed - 1)
        assert not main_memory_tables(file.tensors, config, there)


@pytest.mark.cuda
def test_an_embedding_goes_to_a_device_that_cannot_read_main_memory(cuda_device, monkeypatch):
    path = GOLDEN / "qwen3.gguf"
    options = {"max_context": 512} | ({} if cuda_device == "cpu" else {"device": cuda_device})
    with Engine.load(path, **options) as engine:
        expected, fewer = engine.logits(range(20)), engine.weight_bytes
    monkeypatch.setattr(ops, "reads_main_memory", lambda device: False)
    with Engine.load(path, **options) as engine:
        assert engine.weight_bytes > fewer
        assert np.array_equal(engine.logits(range(20)), expected)


def test_the_cpu_has_all_weights_packed():
    if ops.is_tiled("cpu"):
        pytest.skip("main memory stands for a device")
    with open_model(GOLDEN / "qwen3.gguf") as file:
        config = config_from_gguf(file.metadata, file.tensors)
        assert not main_memory_tables(file.tensors, config, Device("cpu"))
