"""Directories of safetensors in the engine: loaded, described, answering, refused."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from helexa.engine.engine import Engine
from helexa.engine.sampling_params import SamplingParams
from helexa.errors import InvalidFile, UnsupportedModel
from helexa.weights.facts import describe
from helexa.weights.safetensors import SafetensorsFile
from support.hf_checkpoint import Layout, write_golden, write_safetensors
from support.model_runs import TOLERANCE, error_ratio, golden

OPTIONS = {"max_context": 512, "num_threads": 1, "kv_dtype": "float32"}


def logits(engine, case):
    found = engine.logits(golden(case).token_ids.tolist())
    return error_ratio(torch.from_numpy(found), golden(case).logits)


@pytest.mark.parametrize("case", ["llama", "qwen3moe", "qwen35_tied"])
def test_a_directory_without_a_tokenizer_serves_token_ids(case, tmp_path):
    directory = write_golden(case, tmp_path / "tiny", Layout(num_files=2))
    engine = Engine.load(directory / "config.json", **OPTIONS)
    try:
        assert engine.name == "tiny"
        assert engine.tokenizer is None
        assert logits(engine, case) < TOLERANCE
    finally:
        engine.close()


def add_tokenizer(directory):
    vocab = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:120])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": "{{ messages[0].content }}{{ eos_token }}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = {"do_sample": True, "temperature": 0.25, "top_k": 7}
    (directory / "generation_config.json").write_text(json.dumps(generation))


async def test_a_directory_with_all_its_files_answers_as_its_weights_say(tmp_path):
    directory = write_golden("qwen3", tmp_path / "tiny", max_position_embeddings=512)
    add_tokenizer(directory)
    engine = Engine.load(directory, **OPTIONS)
    try:
        assert (engine.generation_defaults.temperature, engine.generation_defaults.top_k) == (0.25, 7)
        assert engine.chat_template.render([{"role": "user", "content": "hi"}]) == "hi<|im_end|>"
        prompt = engine.tokenizer.encode("hello")
        params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
        answer = [
            token for delta in [d async for d in engine.generate(prompt, params)] for token in delta.token_ids
        ]
        expected = list(prompt)
        for _ in answer:
            expected.append(int(engine.logits(expected)[-1].argmax()))
        assert answer == expected[len(prompt) :]
        assert len(answer) == 5
    finally:
        engine.close()


def test_pooling_is_that_of_sentence_transformers(tmp_path):
    directory = write_golden(
        "qwen3", tmp_path / "tiny", Layout(prefix="", has_head=False), tie_word_embeddings=True
    )
    (directory / "1_Pooling").mkdir()
    for key, pooling in (("pooling_mode_mean_tokens", "mean"), ("pooling_mode_lasttoken", "last")):
        (directory / "1_Pooling" / "config.json").write_text(json.dumps({key: True}))
        engine = Engine.load(directory, **OPTIONS)
        engine.close()
        assert engine.pooling == pooling


def test_tensors_of_other_parts_are_counted_and_left_alone(tmp_path, caplog):
    directory = write_golden("qwen35_tied", tmp_path / "tiny", Layout(prefix="model.language_model."))
    patch = np.ones((2, 3), np.float32)
    write_safetensors(directory / "more.safetensors", {"model.visual.patch_embed.weight": ("F32", patch)})
    names = dict.fromkeys(SafetensorsFile(directory / "model.safetensors").tensors, "model.safetensors")
    names["model.visual.patch_embed.weight"] = "more.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with caplog.at_level("INFO"):
        engine = Engine.load(directory, **OPTIONS)
    try:
        assert logits(engine, "qwen35_tied") < TOLERANCE
    finally:
        engine.close()
    (record,) = [record for record in caplog.records if record.message == "tensors_of_other_parts"]
    assert "unused_tensors" not in caplog.text
    assert record.fields["first"] == "model.visual.patch_embed.weight"


def test_a_directory_is_described_from_its_headers(tmp_path):
    directory = write_golden("qwen35moe", tmp_path / "tiny", Layout(dtype="BF16", num_files=2))
    facts = describe(directory)
    assert (facts.name, facts.architecture, facts.quantization) == ("tiny", "qwen35moe", "BF16")
    assert facts.context_length == 1024
    assert facts.size_bytes == sum(path.stat().st_size for path in directory.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda path: (path / "model.safetensors").unlink(), InvalidFile, "tiny: found no weights"),
        (
            lambda path: (path / "config.json").write_text('{"model_type": "mamba2"}'),
            UnsupportedModel,
            "architecture 'mamba2' is not implemented; known: llama, qwen2",
        ),
        (
            lambda path: (path / "config.json").write_text("[]"),
            InvalidFile,
            r"config\.json: found list, expected a JSON object",
        ),
        (
            lambda path: write_golden("qwen3moe", path, num_experts=9),
            InvalidFile,
            "found 7 experts' gate_proj in layer 0, expected 9",
        ),
        (
            lambda path: write_golden("qwen3", path, Layout(has_head=False)),
            InvalidFile,
            r"found no lm_head\.weight, expected one, as config.json says tie_word_embeddings is false",
        ),
        (
            lambda path: write_golden("qwen3", path, intermediate_size=91),
            InvalidFile,
            r"tensor 'blk\.0\.ffn_gate\.weight' has shape",
        ),
    ],
)
def test_a_directory_that_does_not_fit_is_refused_with_a_sentence(tmp_path, break_it, error, message):
    directory = write_golden("qwen3", tmp_path / "tiny")
    break_it(directory)
    with pytest.raises(error, match=message):
        Engine.load(directory, **OPTIONS)
