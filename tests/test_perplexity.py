"""A real model on a real text predicts as well as llama.cpp says it should."""

import math
from pathlib import Path

import pytest

from helexa.cli.local import load_engine
from helexa.cli.perplexity import cut, evaluate
from helexa.quant import FORMATS
from helexa.weights.gguf import GGUFFile, TensorInfo
from helexa.weights.gguf_writer import encode_entry, encode_header
from helexa.weights.model_file import open_model
from helexa.weights.quantize import write_quantized
from helexa.weights.recipes import find_recipe

TEXT = Path(__file__).parent / "data" / "public_domain.txt"
# llama-perplexity -f public_domain.txt -c 512; docs/numerics.md has the whole commands
LLAMA_CPP = 16.9661
LLAMA_CPP_Q4_K_M = 19.7745  # of the first 3 chunks


@pytest.mark.model
def test_the_starter_model_has_the_perplexity_that_llama_cpp_reports(starter_model: Path) -> None:
    engine = load_engine(starter_model, context=512, threads=None, kv_dtype="float16")
    try:
        chunks = cut(engine.tokenizer, TEXT.read_text("utf-8"), 512)
        result = evaluate(engine, chunks)
    finally:
        engine.close()
    assert len(chunks) == 25
    assert result.scored_tokens == 6375
    assert result.perplexity == pytest.approx(LLAMA_CPP, rel=0.005)


def write_float32(file: GGUFFile, target: Path) -> None:
    """The same model with every tensor decoded."""
    tensors = [
        TensorInfo(info.name, info.shape, "f32", 0, 4 * math.prod(info.shape))
        for info in file.tensors.values()
    ]
    header, offsets = encode_header(
        [encode_entry(key, value) for key, value in file.metadata.items()], tensors
    )
    with target.open("wb") as out:
        out.write(header)
        for info, offset in zip(file.tensors.values(), offsets, strict=True):
            out.seek(offset)
            rows = file.rows(info.name, 0, info.num_rows)
            out.write(FORMATS[info.format].dequantize(rows).tobytes())


@pytest.mark.model
def test_real_weights_as_q4_k_m_have_the_perplexity_that_llama_cpp_reports_of_that_file(
    starter_model: Path, tmp_path: Path
) -> None:
    plain, quantized = tmp_path / "float32.gguf", tmp_path / "q4_k_m.gguf"
    with open_model(starter_model) as file:
        write_float32(file, plain)
    with open_model(plain) as file:
        write_quantized(file, quantized, find_recipe("q4_k_m"))
    plain.unlink()
    engine = load_engine(quantized, context=512, threads=None, kv_dtype="float16")
    try:
        chunks = cut(engine.tokenizer, TEXT.read_text("utf-8"), 512)[:3]
        result = evaluate(engine, chunks)
    finally:
        engine.close()
    assert result.perplexity == pytest.approx(LLAMA_CPP_Q4_K_M, rel=0.01)
