"""A real model on a real text predicts as well as llama.cpp says it should."""

from pathlib import Path

import pytest

from helexa.cli.local import load_engine
from helexa.cli.perplexity import cut, evaluate

TEXT = Path(__file__).parent / "data" / "public_domain.txt"
LLAMA_CPP = 16.9661  # llama-perplexity -f public_domain.txt -c 512; docs/numerics.md has the whole command


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
