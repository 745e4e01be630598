"""What is read from GGUF metadata, and what is refused in which words."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.errors import InvalidFile, UnsupportedModel
from helexa.layers.rotary import RopeScaling
from helexa.layers.step import PAGE_TOKENS
from helexa.models import MODELS, config_from_gguf, kv_cache_shapes
from helexa.models.config import ARCHITECTURES


@dataclass
class Shape:
    shape: tuple[int, ...]


TENSORS = {"token_embd.weight": Shape((1000, 64)), "output.weight": Shape((1000, 64))}
VALUES = {
    "context_length": 4096,
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
}


def read(architecture="llama", tensors=TENSORS, **changes):
    """The configuration of VALUES with changes; `__` stands for a dot and None removes a key."""
    values = VALUES | {key.replace("__", "."): value for key, value in changes.items()}
    metadata = {f"{architecture}.{key}": value for key, value in values.items() if value is not None}
    return config_from_gguf({"general.architecture": architecture} | metadata, tensors)


def test_every_architecture_has_a_model():
    assert set(MODELS) == set(ARCHITECTURES)


def test_plain_metadata_give_the_usual_defaults():
    config = read()
    assert (config.head_dim, config.rotary_dim, config.rope_theta) == (16, 16, 10000.0)
    assert config.attention_scale == 0.25
    assert config.vocab_size == 1000
    assert config.max_position_embeddings == 4096
    assert config.rope_scaling is None
    assert not config.tie_word_embeddings


def test_architectures_differ_in_pairs_biases_and_norms():
    llama, qwen2, qwen3 = (read(name) for name in ("llama", "qwen2", "qwen3"))
    assert [c.rope_interleaved for c in (llama, qwen2, qwen3)] == [True, False, False]
    assert [c.attention_bias for c in (llama, qwen2, qwen3)] == [False, True, False]
    assert [c.qk_norm for c in (llama, qwen2, qwen3)] == [False, False, True]


def test_the_head_is_tied_when_the_file_has_none():
    assert read(tensors={"token_embd.weight": Shape((1000, 64))}).tie_word_embeddings


def test_heads_are_as_many_as_kv_heads_unless_said_otherwise():
    assert read(attention__head_count_kv=None).num_key_value_heads == 4


def test_a_list_with_one_value_for_all_layers_is_that_value():
    assert read(attention__head_count_kv=[2, 2], feed_forward_length=(96, 96)).num_key_value_heads == 2


def test_explicit_head_size_rotary_part_and_scale_are_used():
    config = read(
        attention__key_length=32, attention__value_length=32, rope__dimension_count=8, attention__scale=0.5
    )
    assert (config.head_dim, config.rotary_dim, config.attention_scale) == (32, 8, 0.5)


def test_the_size_of_heads_need_not_divide_the_hidden_size():
    assert read(attention__head_count=6, attention__key_length=16).head_dim == 16


def test_linear_scaling_is_read_with_and_without_its_type():
    expected = RopeScaling("linear", 4.0)
    assert read(rope__scaling__type="linear", rope__scaling__factor=4.0).rope_scaling == expected
    assert read(rope__scaling__factor=4.0).rope_scaling == expected
    assert read(rope__scale_linear=4.0).rope_scaling == expected
    assert read(rope__scaling__type="none", rope__scaling__factor=4.0).rope_scaling is None
    assert read(rope__scaling__type="linear", rope__scaling__factor=1.0).rope_scaling is None
    assert read(rope__scaling__type="linear", rope__scaling__factor=0.0).rope_scaling is None


def test_yarn_defaults_are_those_of_the_paper():
    scaling = read(rope__scaling__type="yarn", rope__scaling__factor=4.0).rope_scaling
    assert scaling.attention_factor == pytest.approx(1.1386294361)  # 0.1 · ln 4 + 1
    assert (scaling.beta_fast, scaling.beta_slow, scaling.extrapolation_factor) == (32.0, 1.0, 1.0)
    assert scaling.original_max_position_embeddings == 4096


def test_yarn_parameters_are_read():
    scaling = read(
        rope__scaling__type="yarn",
        rope__scaling__factor=8.0,
        rope__scaling__original_context_length=2048,
        rope__scaling__attn_factor=0.5,
        rope__scaling__yarn_attn_factor=1.5,
        rope__scaling__yarn_beta_fast=16.0,
        rope__scaling__yarn_beta_slow=2.0,
        rope__scaling__yarn_ext_factor=0.5,
    ).rope_scaling
    assert scaling == RopeScaling("yarn", 8.0, 0.75, 2048, 16.0, 2.0, 0.5)


def test_yarn_without_a_ramp_has_no_factor_on_attention():
    keys = {
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 8.0,
        "rope__scaling__yarn_ext_factor": 0.0,
    }
    assert read(**keys).rope_scaling.attention_factor == 1.0


def test_an_unknown_architecture_is_refused_by_name_with_those_that_are_known():
    with pytest.raises(UnsupportedModel, match=r"architecture 'gpt2' .*known: llama, qwen2, qwen3"):
        config_from_gguf({"general.architecture": "gpt2"}, {})


@pytest.mark.parametrize("architecture", [None, 7, ["llama"]])
def test_a_missing_architecture_is_named(architecture):
    with pytest.raises(InvalidFile, match=r"general\.architecture is .*, expected the name"):
        config_from_gguf({"general.architecture": architecture}, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": None}, r"llama\.block_count is missing, expected an integer from 1 to"),
        ({"block_count": 0}, r"llama\.block_count is 0, expected an integer from 1 to"),
        ({"block_count": 2.5}, r"llama\.block_count is 2\.5, expected an integer"),
        ({"block_count": True}, r"llama\.block_count is True, expected an integer"),
        (
            {"embedding_length": 1 << 40},
            r"llama\.embedding_length is 1099511627776, expected an integer from 1 to",
        ),
        ({"feed_forward_length": "96"}, r"llama\.feed_forward_length is '96', expected an integer"),
        ({"attention__head_count": 3}, r"head_count_kv is 2, expected a divisor of the 3 attention heads"),
        ({"attention__head_count": 6}, r"head_count is 6, expected a divisor of embedding_length 64"),
        ({"attention__key_length": 1024}, r"key_length is 1024, expected an integer from 1 to 512"),
        ({"attention__layer_norm_rms_epsilon": None}, r"rms_epsilon is missing, expected a number"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, r"rms_epsilon is nan, expected a number"),
        ({"rope__freq_base": 0.0}, r"rope\.freq_base is 0\.0, expected a number above 1"),
        ({"rope__freq_base": float("inf")}, r"rope\.freq_base is inf, expected a number"),
        (
            {"rope__dimension_count": 7},
            r"dimension_count is 7, expected an even number up to the 16 of a head",
        ),
        ({"rope__dimension_count": 18}, r"dimension_count is 18, expected an even number up to the 16"),
        (
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 0.5},
            r"factor is 0\.5, expected a number from 1",
        ),
        ({"vocab_size": 999}, r"llama\.vocab_size is 999, expected the 1000 rows of token_embd\.weight"),
    ],
)
def test_a_wrong_value_is_refused_with_key_found_and_expected(changes, message):
    with pytest.raises(InvalidFile, match=message) as caught:
        read(**changes)
    assert not isinstance(caught.value, UnsupportedModel)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_count": 8}, r"llama\.expert_count is 8, supported is a model without it"),
        (
            {"attention__sliding_window": 1024},
            r"sliding_window is 1024, .* at least the context of 4096 tokens",
        ),
        ({"attention__causal": False}, r"attention\.causal is False, supported is causal attention"),
        (
            {"attention__value_length": 32},
            r"value_length is 32, supported is the 16 of attention\.key_length",
        ),
        (
            {"attention__head_count_kv": [2, 4]},
            r"head_count_kv is \[2, 4\], supported is the same value for all",
        ),
        (
            {"rope__scaling__type": "longrope"},
            r"scaling\.type is 'longrope', supported is none, linear or yarn",
        ),
        (
            {"final_logit_softcapping": 30.0},
            r"final_logit_softcapping is 30\.0, supported is a model without it",
        ),
    ],
)
def test_a_feature_that_would_change_the_numbers_is_refused_by_name(changes, message):
    with pytest.raises(UnsupportedModel, match=message):
        read(**changes)


def test_features_that_are_present_but_off_are_no_obstacle():
    read(expert_count=0, attention__sliding_window=0, attention__causal=True, rope__scaling__type="none")
    read(attention__sliding_window=4096)


@pytest.mark.parametrize(
    ("tensors", "found"),
    [({}, "missing"), ({"token_embd.weight": Shape((1000,))}, r"of shape \[1000\]")],
)
def test_a_file_without_an_embedding_matrix_is_refused(tensors, found):
    with pytest.raises(InvalidFile, match=f"'token_embd.weight' is {found}, expected a matrix"):
        read(tensors=tensors)


KEYS = [
    *VALUES,
    *("attention.key_length", "attention.value_length", "attention.scale", "attention.causal"),
    *("attention.sliding_window", "rope.dimension_count", "rope.freq_base", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.yarn_ext_factor"),
    *(
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.attn_factor",
        "rope.scale_linear",
        "vocab_size",
        "expert_count",
    ),
]
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.floats() | st.text(max_size=4)
ANYTHING = SCALARS | st.lists(SCALARS, max_size=3) | st.sampled_from(["yarn", "linear", 16, 2, 1.0])


@given(st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=4))
def test_whatever_the_values_are_the_answer_is_a_configuration_or_a_refusal(values):
    metadata = {f"llama.{key}": value for key, value in (VALUES | values).items()}
    try:
        config = config_from_gguf({"general.architecture": "llama"} | metadata, TENSORS)
    except InvalidFile:
        return
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert 2 <= config.rotary_dim <= config.head_dim


def test_caches_are_described_layer_by_layer():
    assert kv_cache_shapes(read(), 5) == [(5, 2, PAGE_TOKENS, 16)] * 2
