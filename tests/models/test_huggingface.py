"""Directories of safetensors compute what transformers computed with the same weights, in every layout."""

import dataclasses
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from helexa.errors import InvalidFile
from helexa.models import build_model
from helexa.weights import hf_tensors, regions
from helexa.weights.model_file import open_model
from support.hf_checkpoint import (
    Layout,
    golden_config,
    golden_tensors,
    write_as_gguf,
    write_golden,
    write_safetensors,
)
from support.model_runs import CASES, TOLERANCE, error_ratio, golden, load, run, with_recorders

MOE_CASES = ["qwen3moe", "qwen3next", "qwen35moe"]
NESTED_CASES = ["qwen35_tied", "qwen35moe"]


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_of_every_layer_and_logits_are_those_of_transformers(case, tmp_path):
    expected = golden(case)
    config, weights = load(write_golden(case, tmp_path / "model"))
    model = build_model(config, weights)
    layers = with_recorders(model)
    logits = run(model, expected.token_ids)
    for layer, hidden in zip(layers, expected.hidden, strict=True):
        assert error_ratio(layer.output, hidden) < TOLERANCE
    assert error_ratio(logits, expected.logits) < TOLERANCE
    assert weights.unused() == weights.file.unread == []


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_file_of_the_same_weights_gives_the_same_logits(case, tmp_path):
    directory = write_golden(case, tmp_path / "model")
    token_ids = golden(case).token_ids
    logits = run(build_model(*load(directory)), token_ids)
    config, weights = load(write_as_gguf(directory, tmp_path / "model.gguf"))
    exact = replace(config, rms_norm_eps=load(directory)[0].rms_norm_eps)  # a GGUF file has it in float32
    assert error_ratio(run(build_model(exact, weights), token_ids), logits) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_is_that_of_the_gguf_file(case, tmp_path):
    config, _ = load(write_golden(case, tmp_path / "model"))
    expected = golden(case).config
    assert config.rms_norm_eps == pytest.approx(expected.rms_norm_eps)  # a GGUF file has it in float32
    given, wanted = config.rope_scaling, expected.rope_scaling
    if wanted is not None:
        assert dataclasses.astuple(given) == pytest.approx(dataclasses.astuple(wanted))
    assert replace(config, rms_norm_eps=expected.rms_norm_eps, rope_scaling=wanted) == expected


@pytest.mark.parametrize("case", ["llama_llama3_rope_tied_biased", "qwen2_yarn", *MOE_CASES])
def test_a_model_in_several_files_is_the_model_in_one(case, tmp_path):
    expected = golden(case)
    model = build_model(*load(write_golden(case, tmp_path / "model", Layout(num_files=3))))
    assert error_ratio(run(model, expected.token_ids), expected.logits) < TOLERANCE


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("case", CASES)
def test_halves_compute_what_their_values_compute_in_single_precision(case, dtype, tmp_path):
    half = build_model(*load(write_golden(case, tmp_path / "half", Layout(dtype, dtype))))
    single = build_model(*load(write_golden(case, tmp_path / "single", Layout(rounded_to=dtype))))
    logits = run(single, golden(case).token_ids)
    assert error_ratio(run(half, golden(case).token_ids), logits) < TOLERANCE
    assert error_ratio(logits, golden(case).logits) > TOLERANCE


def test_a_model_without_a_head_is_read_for_what_it_computes_before(tmp_path):
    expected = golden("qwen3")
    directory = write_golden("qwen3", tmp_path / "model", Layout(prefix="", has_head=False))
    model = build_model(*load(directory))
    model.lm_head = expected.build().lm_head
    assert error_ratio(run(model, expected.token_ids), expected.logits) < TOLERANCE


@pytest.mark.parametrize("case", MOE_CASES)
def test_experts_in_stacks_are_those_one_by_one(case, tmp_path):
    expected = golden(case)
    directory = write_golden(case, tmp_path / "model", Layout(fused_experts=True))
    assert error_ratio(run(build_model(*load(directory)), expected.token_ids), expected.logits) < TOLERANCE


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model."])
@pytest.mark.parametrize("case", NESTED_CASES)
def test_the_text_model_of_a_larger_one_is_found(case, prefix, tmp_path):
    expected = golden(case)
    directory = write_golden(case, tmp_path / "model", Layout(prefix=prefix, nested=True))
    model = build_model(*load(directory))
    assert error_ratio(run(model, expected.token_ids), expected.logits) < TOLERANCE


def test_probabilities_of_experts_are_normalised_as_configured(tmp_path):
    expected = golden("qwen3moe")
    config, weights = load(write_golden("qwen3moe", tmp_path / "model", norm_topk_prob=False))
    assert config.moe is not None
    assert not config.moe.norm_topk_prob
    logits = run(build_model(config, weights), expected.token_ids)
    assert error_ratio(logits, expected.logits) > 100 * TOLERANCE
    plain = golden_config("qwen3moe")
    del plain["norm_topk_prob"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(plain))
    assert load(tmp_path / "model")[0] == config  # transformers' default for this architecture


@pytest.mark.parametrize(
    ("case", "target"),
    [
        ("llama", "blk.0.attn_q.weight"),
        ("qwen35_tied", "blk.0.attn_qkv.weight"),
        ("qwen35_tied", "blk.0.ssm_out.weight"),
        ("qwen35_tied", "blk.0.ssm_a"),
        ("qwen35_tied", "blk.0.ssm_conv1d.weight"),
        ("qwen35_tied", "blk.0.attn_norm.weight"),
        ("qwen3next", "blk.0.attn_gate.weight"),
        ("qwen35moe", "blk.0.ffn_gate_exps.weight"),
    ],
)
def test_an_adaptation_left_out_is_noticed(case, target, tmp_path, monkeypatch):
    expected = golden(case)
    adapted = hf_tensors.gguf_tensors

    def left_out(checkpoint, config):
        found, unknown = adapted(checkpoint, config)
        region = found[target]
        if isinstance(region, regions.Computed):
            wrong = regions.values(region)[::-1] if "norm" not in target else regions.values(region) - 1
            found[target] = regions.Computed(region.shape, lambda: wrong)
        elif isinstance(region, regions.Columns):
            found[target] = region.source
        elif isinstance(region, regions.Stacked):
            found[target] = regions.Stacked(region.sources[::-1])
        else:
            found[target] = regions.Gathered(region.source, np.arange(len(region.index)), region.shape)
        return found, unknown

    monkeypatch.setattr("helexa.weights.huggingface.gguf_tensors", left_out)
    model = build_model(*load(write_golden(case, tmp_path / "model")))
    assert error_ratio(run(model, expected.token_ids), expected.logits) > 100 * TOLERANCE


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_tensors_read_in_slices_are_those_read_at_once(dtype, tmp_path):
    for case in ("llama", "qwen3next", "qwen35moe"):
        with open_model(write_golden(case, tmp_path / case, Layout(dtype=dtype))) as file:
            for name, info in file.tensors.items():
                whole = bytes(file.data(name))
                cuts = sorted({0, 1, info.num_rows // 3, info.num_rows - 1, info.num_rows})
                pieces = [bytes(file.rows(name, *cut)) for cut in itertools.pairwise(cuts)]
                assert b"".join(pieces) == whole, name
                file.release_rows(name, 0, info.num_rows)
                assert bytes(file.data(name)) == whole
                assert len(whole) == info.nbytes


def test_a_model_outlives_its_directory(tmp_path):
    expected = golden("qwen3")
    directory = write_golden("qwen3", tmp_path / "model")
    config, weights = load(directory)
    model = build_model(config, weights)
    weights.file.close()
    (directory / "model.safetensors").unlink()
    assert error_ratio(run(model, expected.token_ids), expected.logits) < TOLERANCE
    assert torch.isfinite(run(model, expected.token_ids)).all()


FP8 = {"quant_method": "fp8", "weight_block_size": [16, 24]}


def write_fp8(case, directory, single):
    """A directory whose projections are float8 with a scale a block, and one of the values that they mean."""
    config = golden_config(case) | {"quantization_config": FP8}
    stored, meant = {}, {}
    for name, data in golden_tensors(case, config, fused_experts=False).items():
        stored[name], meant[name] = ("F32", data), data
        if not name.endswith("_proj.weight"):
            continue
        rows, cols = (-(-size // block) for size, block in zip(data.shape, (16, 24), strict=True))
        scales = np.exp2(np.arange(rows * cols) % 5 - 9).astype(np.float32).reshape(rows, cols) * 1.125
        every = scales.repeat(16, 0).repeat(24, 1)[: data.shape[0], : data.shape[1]]
        codes = torch.from_numpy(data / every).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored[name] = ("F8_E4M3", codes.view(torch.uint8).numpy())
        stored[name + "_scale_inv"] = ("F32", scales)
        meant[name] = (codes.float() * torch.from_numpy(every)).to(torch.bfloat16).float().numpy()
    for path, tensors in ((directory, stored), (single, {n: ("F32", data) for n, data in meant.items()})):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        write_safetensors(path / "model.safetensors", tensors)


@pytest.mark.parametrize("case", ["llama", "qwen3moe", "qwen35_tied"])
def test_float8_with_scales_of_blocks_computes_what_its_values_compute(case, tmp_path):
    write_fp8(case, tmp_path / "fp8", tmp_path / "single")
    token_ids = golden(case).token_ids
    config, weights = load(tmp_path / "fp8")
    logits = run(build_model(config, weights), token_ids)
    assert error_ratio(logits, run(build_model(*load(tmp_path / "single")), token_ids)) < TOLERANCE
    assert weights.unused() == weights.file.unread == []


def test_all_codes_of_float8_mean_what_torch_takes_them_for():
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(regions._E4M3, expected, equal_nan=True)


@pytest.mark.parametrize("change", [{"weight_block_size": [16, 16]}, None])
def test_float8_without_fitting_scales_is_refused_by_name(change, tmp_path):
    write_fp8("llama", tmp_path / "fp8", tmp_path / "single")
    quantization = None if change is None else FP8 | change
    config = golden_config("llama") | {"quantization_config": quantization}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidFile, match=r"found tensor 'model\.layers\.0\..*_proj\.weight"):
        load(tmp_path / "fp8")
