"""config.json as GGUF's metadata, and the refusals that name its keys."""

import math
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.errors import InvalidFile, UnsupportedModel
from helexa.weights.hf_config import read_config, sampling_metadata

DENSE = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "vocab_size": 100,
}
HYBRID = DENSE | {"model_type": "qwen3_5_text"}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def read(base=DENSE, **changes):
    return read_config({key: value for key, value in (base | changes).items() if value is not None})


def value(key, base=DENSE, **changes):
    config = read(base, **changes)
    return config.metadata.get(f"{config.architecture}.{key}")


def test_what_is_left_out_is_what_transformers_takes():
    assert value("attention.key_length") == 128
    assert value("attention.key_length", DENSE | {"model_type": "qwen2"}) == 16
    assert value("attention.key_length", HYBRID) == 256
    assert value("rope.dimension_count", HYBRID) == 64
    assert value("rope.dimension_sections", HYBRID) == [11, 11, 10, 0]
    assert value("ssm.time_step_rank", HYBRID) == 32
    assert value("full_attention_interval", HYBRID) == 4
    assert value("attention.layer_norm_rms_epsilon") == 1e-6
    assert value("rope.freq_base") == 10000.0
    assert value("attention.head_count_kv", num_key_value_heads=None) == 4
    assert value("expert_weights_norm", DENSE | MOE, model_type="qwen3_moe") is False
    assert value("expert_weights_norm", DENSE | MOE, model_type="qwen3_next") is True
    assert read().is_tied is None


def test_experts_are_counted_under_either_name():
    for key in ("num_experts", "num_local_experts"):
        changes = MOE | {"num_experts": None, key: 8, "model_type": "qwen3_moe"}
        assert value("expert_count", **changes) == 8


def test_the_text_model_below_text_config_is_read():
    outer = {"model_type": "qwen3_5", "text_config": HYBRID, "tie_word_embeddings": True}
    config = read_config(outer)
    assert config.architecture == "qwen35"
    assert config.is_tied
    assert not read_config(outer | {"tie_word_embeddings": False}).is_tied


def test_rotation_is_read_in_the_old_form_and_in_the_new():
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}}
    assert read(**old).metadata == read(**new).metadata
    assert value("rope.scaling.factor", **old) == 4.0
    assert value("rope.freq_base", **old) == 5e5
    assert value("rope.scaling.type", rope_scaling={"rope_type": "default"}) is None
    assert value("rope.scaling.type", rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]}) is None


def test_yarn_has_the_attention_factor_that_is_meant():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert value("rope.scaling.yarn_attn_factor", rope_parameters=yarn) is None  # its own
    explicit = yarn | {"attention_factor": 1.5}
    assert value("rope.scaling.yarn_attn_factor", rope_parameters=explicit) == 1.5
    both = yarn | {"mscale": 1.0, "mscale_all_dim": 0.5}
    expected = (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert value("rope.scaling.yarn_attn_factor", rope_parameters=both) == pytest.approx(expected)
    by_contexts = {"rope_type": "yarn", "original_max_position_embeddings": 1024}
    assert value("rope.scaling.factor", rope_parameters=by_contexts) == 4.0
    assert value("rope.scaling.original_context_length", rope_parameters={"rope_type": "yarn"}) == 4096


def test_llama_3_divides_slow_frequencies_only():
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    factors = read(rope_parameters=rope | {"original_max_position_embeddings": 64}).frequency_factors
    assert factors[0] == 1.0
    assert factors[-1] == 8.0
    assert (np.diff(factors) >= 0).all()
    assert ((factors > 1) & (factors < 8)).any()


def test_layers_in_an_order_of_their_own_are_listed():
    kinds = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
    assert value("attention.recurrent_layers", HYBRID, layer_types=kinds) == [False, True, True, False]
    usual = ["linear_attention", "full_attention"] * 2
    assert value("full_attention_interval", HYBRID, layer_types=usual) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "config.json: model_type is None"),
        ({"hidden_size": None}, "config.json: hidden_size is missing, expected an integer from 1 up"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected an integer"),
        ({"num_attention_heads": True}, "num_attention_heads is True, expected an integer"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan, expected a number above 0"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is missing"),
        ({"rope_parameters": {"full": {"rope_theta": 1.0}}}, "expected one set of parameters"),
        ({"rope_parameters": []}, "rope_parameters"),
    ],
)
def test_a_wrong_value_is_refused_with_key_found_and_expected(changes, message):
    if changes == {"rope_parameters": []}:
        read(**changes)  # as good as none
        return
    with pytest.raises(InvalidFile, match=message) as caught:
        read(**changes)
    assert not isinstance(caught.value, UnsupportedModel)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mamba"},
            "architecture 'mamba' is not implemented; known: llama, qwen2, qwen3, qwen3_5,",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported is silu"),
        (
            {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 2},
            "sliding_window is 512",
        ),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\], supported is experts in every layer"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            "rope_type is 'longrope', supported is default, linear",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "truncate": False}},
            "truncate is False, supported is true",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq', supported is fp8"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size is None, supported is two"),
        ({"model_type": "qwen3_5_text", "layer_types": ["mamba"] * 4}, "layer_types is"),
    ],
)
def test_a_feature_that_would_change_the_numbers_is_refused_by_name(changes, message):
    with pytest.raises(UnsupportedModel, match=message):
        read(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False, "sliding_window": 512},
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 4},
        {"use_sliding_window": True, "sliding_window": 512, "layer_types": ["full_attention"] * 4},
        {"mlp_only_layers": [], "decoder_sparse_step": 1},
        {"partial_rotary_factor": 1.0},
    ],
)
def test_features_that_are_present_but_off_are_no_obstacle(changes):
    assert read(**changes).architecture == "qwen3"


def test_sampling_is_what_generation_config_says():
    said = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}
    assert sampling_metadata(said) == {
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.95,
        "general.sampling.penalty_repeat": 1.1,
    }
    assert sampling_metadata(said | {"do_sample": False}) == {"general.sampling.penalty_repeat": 1.1}


KEYS = [*DENSE, *MOE, "head_dim", "rope_parameters", "rope_scaling", "layer_types", "quantization_config"]
KEYS += ["text_config", "partial_rotary_factor", "sliding_window", "use_sliding_window", "rms_norm_eps"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
INNER = st.dictionaries(
    st.sampled_from(
        ["rope_type", "factor", "rope_theta", "mrope_section", "truncate", "mscale", "beta_fast"]
    ),
    SCALARS | st.sampled_from(["yarn", "linear", "llama3"]),
)
ANYTHING = SCALARS | st.lists(SCALARS, max_size=4) | INNER
ROPES = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["yarn", "llama3", "linear"]), "factor": st.just(2.0) | SCALARS},
    optional=dict.fromkeys(["beta_fast", "mrope_section", "low_freq_factor", "mscale"], SCALARS),
)


@given(
    st.sampled_from(["llama", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"]),
    st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=4)
    | st.fixed_dictionaries({"rope_parameters": ROPES}),
)
def test_whatever_the_values_are_the_answer_is_a_configuration_or_a_refusal(model_type, values):
    with suppress(InvalidFile):
        read_config(DENSE | MOE | {"model_type": model_type} | values)
