"""Golden parity with transformers, and the same numbers from every way to run a sequence."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from helexa import ops
from helexa.layers.step import PAGE_TOKENS
from helexa.models import build_model
from helexa.quant import FORMATS
from helexa.weights.load import GGUFWeights
from support.model_runs import CASES, TOLERANCE, Caches, error_ratio, golden, load, run, with_recorders


@pytest.fixture(scope="module", autouse=True)
def closed_files():
    yield
    golden.cache_clear()


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_of_every_layer_and_logits_are_those_of_transformers(case):
    expected = golden(case)
    model = expected.build()
    layers = with_recorders(model)
    logits = run(model, expected.token_ids)
    for layer, hidden in zip(layers, expected.hidden, strict=True):
        assert error_ratio(layer.output, hidden) < TOLERANCE
    assert error_ratio(logits, expected.logits) < TOLERANCE
    assert expected.weights.unused() == []


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("case", CASES)
def test_prefill_in_chunks_equals_prefill_at_once(case, chunk):
    expected = golden(case)
    if chunk == 1 and len(expected.token_ids) > 256:
        chunk = 129  # crosses the page border within a step
    assert error_ratio(run(expected.build(), expected.token_ids, chunk), expected.logits) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_a_long_prompt_in_chunks_of_512_equals_one_at_once_and_begins_as_the_short_one(case):
    expected = golden(case)
    known = len(expected.token_ids)
    more = torch.randint(
        expected.config.vocab_size, (700 - known,), generator=torch.Generator().manual_seed(3)
    )
    token_ids, model = torch.cat([expected.token_ids, more.to(torch.int32)]), expected.build()
    at_once = run(model, token_ids)
    assert error_ratio(at_once[:known], expected.logits) < TOLERANCE
    assert error_ratio(run(model, token_ids, 512), at_once) < TOLERANCE
    assert error_ratio(run(model, token_ids.roll(1), 512)[-1:], at_once[-1:]) > 100 * TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_decode_after_prefill_continues_the_sequence(case):
    expected = golden(case)
    model, caches = expected.build(), Caches(expected.config)
    start = len(expected.token_ids) - 50  # decode crosses the page border of the long cases
    model(caches.step({0: expected.token_ids[:start]}))
    for position in range(start, len(expected.token_ids)):
        logits = model(caches.step({0: expected.token_ids[position : position + 1]}))
        assert error_ratio(logits[0], expected.logits[position]) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_sequences_of_different_lengths_decode_together_as_alone(case):
    expected = golden(case)
    model, caches = expected.build(), Caches(expected.config, num_sequences=3)
    streams = {0: expected.token_ids, 1: expected.token_ids.flip(0), 2: expected.token_ids.roll(11)}
    alone = {sequence: run(model, tokens) for sequence, tokens in streams.items()}
    lengths = {0: 3, 1: 33, 2: len(expected.token_ids) - 8}
    for sequence, length in lengths.items():
        model(caches.step({sequence: streams[sequence][:length]}, slice(0, 0)))
    for offset in range(8):
        logits = model(caches.step({s: streams[s][n + offset : n + offset + 1] for s, n in lengths.items()}))
        for row, (sequence, length) in enumerate(lengths.items()):
            assert error_ratio(logits[row], alone[sequence][length + offset]) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_prefill_and_decode_may_share_a_step(case):
    expected = golden(case)
    model, caches = expected.build(), Caches(expected.config, num_sequences=2)
    tokens, other = expected.token_ids, expected.token_ids.flip(0)
    model(caches.step({0: tokens[:20], 1: other[:9]}))
    logits = model(caches.step({1: other[9:40], 0: tokens[20:21]}, slice(30, 32)))
    assert error_ratio(logits[0], run(model, other)[39]) < TOLERANCE
    assert error_ratio(logits[1], expected.logits[20]) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_a_captured_forward_repeats_the_eager_one_with_new_inputs(case):
    expected = golden(case)
    model, caches, graph = expected.build(), Caches(expected.config), ops.CpuGraph()
    start = len(expected.token_ids) - 50
    model(caches.step({0: expected.token_ids[:start]}, slice(0, 0)))
    eager = Caches(expected.config)
    model(eager.step({0: expected.token_ids[:start]}, slice(0, 0)))
    step = caches.step({0: expected.token_ids[start : start + 1]})
    with graph.capture():
        logits = model(step)
    for position in range(start, len(expected.token_ids)):
        token = expected.token_ids[position : position + 1]
        now = eager.step({0: token})
        for name in ("token_ids", "positions", "kv_lengths"):
            getattr(step, name).copy_(getattr(now, name))
        step.slots.copy_(caches.pages[0][position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS)
        graph.replay()
        assert torch.equal(logits, model(now))
        assert error_ratio(logits[0], expected.logits[position]) < TOLERANCE


def test_rows_without_logits_cost_no_head_and_change_no_cache():
    expected = golden("qwen3")
    model, everything, nothing = expected.build(), Caches(expected.config), Caches(expected.config)
    model(everything.step({0: expected.token_ids}))
    assert model(nothing.step({0: expected.token_ids}, slice(0, 0))).shape == (0, expected.config.vocab_size)
    last = model(Caches(expected.config).step({0: expected.token_ids}, slice(69, 70)))
    assert error_ratio(last, expected.logits[69:]) < TOLERANCE
    for with_logits, without in zip(everything.k + everything.v, nothing.k + nothing.v, strict=True):
        torch.testing.assert_close(with_logits, without, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_a_half_precision_cache_costs_little(dtype, tolerance):
    expected = golden("qwen3_yarn_tied_two_pages")
    logits = expected.build()(Caches(expected.config, dtype=dtype).step({0: expected.token_ids}))
    assert 1e-6 < error_ratio(logits, expected.logits) < tolerance


def test_a_partly_rotated_head_is_one_whose_other_pairs_stand_still():
    expected = golden("llama")  # its pairs are neighbours, so the first 10 values of a head are 5 pairs
    partly, wholly = expected.build(rotary_dim=10), expected.build()
    frequencies = partly.model.rotary_emb.inv_freq
    wholly.model.rotary_emb.inv_freq = torch.cat([frequencies, torch.zeros(3)])
    token_ids = expected.token_ids
    assert error_ratio(run(partly, token_ids), run(wholly, token_ids)) < 1e-6
    assert error_ratio(run(partly, token_ids), expected.logits) > 100 * TOLERANCE


def test_a_tied_head_shares_the_packed_embedding():
    tied, untied = golden("qwen2_tied").build(), golden("qwen2_yarn").build()
    assert tied.lm_head.weights[0] is tied.model.embed_tokens.weight
    assert untied.lm_head.weights[0] is not untied.model.embed_tokens.weight


# What follows shows that the golden cases see each detail: a model with it wrong is far off.


class Without:
    """A source that hides some tensors."""

    def __init__(self, source: GGUFWeights, hidden: str):
        self.source, self.hidden = source, hidden

    def __contains__(self, name: str) -> bool:
        return self.hidden not in name and name in self.source

    def linear(self, name: str) -> ops.PackedWeight:
        return self.source.linear(name)

    def table(self, name: str) -> ops.PackedWeight | ops.RowTable:
        return self.source.table(name)

    def vector(self, name: str) -> Tensor:
        return self.source.vector(name)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("llama", {"rope_interleaved": False}),
        ("qwen2_tied", {"rope_interleaved": True}),
        ("qwen3", {"rope_interleaved": True}),
        ("qwen3", {"qk_norm": False}),
        ("qwen3", {"attention_scale": 1 / 8}),
        ("qwen3", {"rms_norm_eps": 1e-2}),
        ("qwen3", {"rope_theta": 20000.0}),
        ("llama", {"rotary_dim": 14}),
        ("qwen2_yarn", {"rope_scaling": None}),
        ("qwen3_yarn_tied_two_pages", {"rope_scaling": None}),
        ("llama_linear_rope_two_pages", {"rope_scaling": None}),
    ],
)
def test_a_wrong_configuration_is_noticed(case, changes):
    expected = golden(case)
    assert error_ratio(run(expected.build(**changes), expected.token_ids), expected.logits) > 100 * TOLERANCE


@pytest.mark.parametrize("case", ["qwen2_yarn", "qwen3_yarn_tied_two_pages"])
@pytest.mark.parametrize(
    "change",
    [{"attention_factor": 1.0}, {"extrapolation_factor": 0.0}, {"beta_fast": 64.0, "beta_slow": 4.0}],
)
def test_each_parameter_of_yarn_is_noticed(case, change):
    expected = golden(case)
    model = expected.build(rope_scaling=replace(expected.config.rope_scaling, **change))
    assert error_ratio(run(model, expected.token_ids), expected.logits) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("case", "hidden"),
    [
        ("qwen2_tied", "attn_k.bias"),
        ("qwen2_tied", "attn_q.bias"),
        ("qwen2_yarn", "attn_v.bias"),
        ("llama_llama3_rope_tied_biased", "attn_q.bias"),
        ("llama_llama3_rope_tied_biased", "attn_output.bias"),
        ("llama_llama3_rope_tied_biased", "ffn_gate.bias"),
        ("llama_llama3_rope_tied_biased", "ffn_down.bias"),
        ("llama_llama3_rope_tied_biased", "rope_freqs"),
    ],
)
def test_a_forgotten_tensor_is_noticed(case, hidden):
    expected = golden(case)
    config = replace(expected.config, attention_bias=False)
    model = build_model(config, Without(expected.weights, hidden))
    assert error_ratio(run(model, expected.token_ids), expected.logits) > 100 * TOLERANCE


@pytest.mark.parametrize("case", ["llama", "qwen3_yarn_tied_two_pages"])
def test_a_wrong_assignment_of_query_heads_to_key_heads_is_noticed(case, monkeypatch):
    expected = golden(case)
    groups = expected.config.num_key_value_heads
    heads = torch.arange(expected.config.num_attention_heads).reshape(groups, -1).T.flatten()

    attention = ops.attention

    def interleaved_groups(q, *args, **keywords):
        out = torch.empty_like(q)
        out[:, heads] = attention(q[:, heads].contiguous(), *args, **keywords).view_as(q)
        return out.flatten(1)

    monkeypatch.setattr(import_module("helexa.ops.rope_attention"), "attention", interleaved_groups)
    assert error_ratio(run(expected.build(), expected.token_ids), expected.logits) > 100 * TOLERANCE


def test_attention_to_what_comes_later_is_noticed():
    expected = golden("qwen2_tied")
    logits = run(expected.build(), expected.token_ids.flip(0)).flip(0)
    assert error_ratio(logits, expected.logits) > 100 * TOLERANCE


# Quantized weights: the same model with each format, against float32 weights of the same values.

# Float16 fields of formats without an encoder in gguf, and their place: for values of spread 1/16.
HALVES = {
    "q4_k": (0, (2.4e-4, 1.8e-3)),
    "q5_k": (0, (1.2e-4, 1.8e-3)),
    "q6_k": (208, (4.8e-5,)),
    "q2_k": (80, (4.5e-3, 6.8e-3)),
    "q3_k": (108, (1.4e-3,)),
    "iq4_nl": (0, (9e-4,)),
    "iq4_xs": (0, (5e-5,)),
}
COMPANION = {
    "q4_k": "q6_k",
    "f32": "bf16",
    "f16": "f32",
    "bf16": "f16",
}  # of attn_v, to mix formats in a matmul
SIZE = 256


def encode(format: str, values: np.ndarray) -> np.ndarray:
    """Rows in a format: those given or, where gguf has no encoder, random blocks of about the same spread."""
    if format not in HALVES:
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[format.upper()])
    block = FORMATS[format]
    seed = int(np.abs(values[0, 0]) * 1e6)
    blocks = np.random.default_rng(seed).integers(
        0, 256, (values.size // block.block_size, block.block_bytes), np.uint8
    )
    offset, halves = HALVES[format]
    blocks[:, offset : offset + 2 * len(halves)] = np.array(halves, np.float16).view(np.uint8)
    return blocks.reshape(len(values), -1)


def write_model(path: Path, format: str, *, decoded: bool) -> None:
    """A qwen3 with matrices of one format but for attn_v; decoded to float32 if asked for."""
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(512)
    writer.add_embedding_length(SIZE)
    writer.add_block_count(2)
    writer.add_feed_forward_length(2 * SIZE)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    rng = np.random.default_rng(3)

    def vector(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", (1 + 0.1 * rng.standard_normal(size)).astype(np.float32))

    def matrix(name: str, rows: int, cols: int = SIZE, format: str = format) -> None:
        data = encode(format, (rng.standard_normal((rows, cols)) / 16).astype(np.float32))
        kind = gguf.GGMLQuantizationType[format.upper()]
        if decoded:
            data, kind = gguf.quants.dequantize(data, kind), gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)

    matrix("token_embd", 100)
    vector("output_norm", SIZE)
    for layer in ("blk.0", "blk.1"):
        vector(f"{layer}.attn_norm", SIZE)
        vector(f"{layer}.attn_q_norm", SIZE // 4)
        vector(f"{layer}.attn_k_norm", SIZE // 4)
        matrix(f"{layer}.attn_q", SIZE)
        matrix(f"{layer}.attn_k", SIZE // 2)
        matrix(f"{layer}.attn_v", SIZE // 2, format=COMPANION.get(format, "q8_0"))
        matrix(f"{layer}.attn_output", SIZE)
        vector(f"{layer}.ffn_norm", SIZE)
        matrix(f"{layer}.ffn_gate", 2 * SIZE)
        matrix(f"{layer}.ffn_up", 2 * SIZE)
        matrix(f"{layer}.ffn_down", SIZE, 2 * SIZE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_quantized_weights_give_the_logits_of_their_values(format, tmp_path):
    token_ids = torch.arange(40, dtype=torch.int32) * 37 % 100
    logits = {}
    for decoded in (False, True):
        write_model(tmp_path / "model.gguf", format, decoded=decoded)
        model = build_model(*load(tmp_path / "model.gguf"))
        logits[decoded] = run(model, token_ids, chunk=None if decoded else 33)
    # Inputs of quantized matrices are rounded to 8 bits; float formats see them as they are.
    assert error_ratio(logits[False], logits[True]) < (
        TOLERANCE if format in ("f32", "f16", "bf16") else 0.04
    )
    assert logits[True].std() > 0.3
