from dataclasses import dataclass

import pytest

from helexa.errors import InvalidParameter
from helexa.weights.recipes import RECIPES, find_recipe


@dataclass(frozen=True)
class Layout:
    shape: tuple[int, ...] = (512, 512)
    format: str = "bf16"


def names(num_layers: int, *kinds: str) -> list[str]:
    return [f"blk.{layer}.{kind}" for layer in range(num_layers) for kind in kinds]


def model(*names: str) -> dict[str, Layout]:
    return dict.fromkeys(names, Layout())


@pytest.mark.parametrize(
    "name",
    [
        "attn_q", "attn_k", "attn_v", "attn_output", "attn_qkv", "attn_gate", "ssm_out", "ffn_gate", "ffn_up",
        "ffn_down", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps", "ffn_gate_shexp",
        "ffn_up_shexp", "ffn_down_shexp",
    ],
)  # fmt: skip
def test_linear_layers_and_experts_are_quantized(name):
    tensor = f"blk.3.{name}.weight"
    assert find_recipe("q6_k").plan(model(tensor)) == {tensor: "q6_k"}


@pytest.mark.parametrize(
    "name",
    [
        "token_embd.weight", "output_norm.weight", "rope_freqs.weight", "blk.0.attn_norm.weight",
        "blk.0.attn_q_norm.weight", "blk.0.attn_q.bias", "blk.0.post_attention_norm.weight",
        "blk.0.ffn_norm.weight", "blk.0.ffn_gate_inp.weight", "blk.0.ffn_gate_inp_shexp.weight",
        "blk.0.ssm_conv1d.weight", "blk.0.ssm_a",
        "blk.0.ssm_dt.bias", "blk.0.ssm_norm.weight", "blk.0.ssm_alpha.weight", "blk.0.ssm_beta.weight",
        "blk.0.ssm_ba.weight", "blk.0.nextn.eh_proj.weight", "blk.0.nextn.embed_tokens.weight", "mm.0.weight",
    ],
)  # fmt: skip
@pytest.mark.parametrize("recipe", RECIPES)
def test_norms_gates_routers_convolutions_and_embeddings_are_not(recipe, name):
    assert find_recipe(recipe).plan(model(name)) == {}


def test_a_head_of_its_own_is_quantized_and_a_tied_one_stays():
    assert find_recipe("q8_0").plan(model("token_embd.weight", "output.weight")) == {"output.weight": "q8_0"}
    assert find_recipe("q4_k_m").plan(model("output.weight")) == {"output.weight": "q6_k"}
    assert find_recipe("q4_k").plan(model("output.weight")) == {"output.weight": "q4_k"}


def more_bits(recipe: str, num_layers: int, kind: str) -> list[int]:
    plan = find_recipe(recipe).plan(model(*names(num_layers, f"{kind}.weight")))
    return [layer for layer in range(num_layers) if plan[f"blk.{layer}.{kind}.weight"] == "q6_k"]


@pytest.mark.parametrize("kind", ["attn_v", "ffn_down", "ffn_down_exps", "ffn_down_shexp"])
@pytest.mark.parametrize("recipe", ["q4_k_m", "q5_k_m"])
def test_mixed_recipes_give_the_fields_layers_more_bits(recipe, kind):
    # What llama-quantize chooses for as many layers.
    assert more_bits(recipe, 28, kind) == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
    assert more_bits(recipe, 2, kind) == [1]
    assert more_bits(recipe, 28, "attn_q") == []


def test_layers_are_counted_among_those_that_have_the_role():
    """A hybrid attends in every fourth layer only."""
    tensors = model(*(f"blk.{layer}.attn_v.weight" for layer in range(3, 64, 4)))
    plan = find_recipe("q4_k_m").plan(tensors)
    ranks = [rank for rank, name in enumerate(tensors) if plan[name] == "q6_k"]
    assert ranks == [0, 1, 4, 7, 10, 13, 14, 15]


def test_fused_projections_get_one_bit_more():
    tensors = model("blk.0.attn_qkv.weight")
    assert find_recipe("q4_k_m").plan(tensors) == {"blk.0.attn_qkv.weight": "q5_k"}
    assert find_recipe("q5_k_m").plan(tensors) == {"blk.0.attn_qkv.weight": "q6_k"}


@pytest.mark.parametrize(
    ("recipe", "narrow"), [("q4_k", "q5_0"), ("q5_k", "q5_1"), ("q6_k", "q8_0"), ("q4_0", "q4_0")]
)
def test_rows_that_are_no_super_blocks_get_blocks_of_32(recipe, narrow):
    tensors = {"output.weight": Layout((10, 96)), "blk.0.attn_q.weight": Layout((10, 40))}
    assert find_recipe(recipe).plan(tensors) == {"output.weight": narrow}


def test_what_is_quantized_already_stays():
    assert find_recipe("q4_0").plan({"output.weight": Layout(format="q8_0")}) == {}


@pytest.mark.parametrize("name", ["q4_k_m", "Q4_K_M", "q4km", " Q4-K-M "])
def test_a_recipe_is_found_in_any_spelling(name):
    assert find_recipe(name).name == "q4_k_m"


def test_an_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(
        InvalidParameter, match="quant is 'Q6_KM'; did you mean q6_k\\? known: q4_0, q8_0, "
    ) as caught:
        find_recipe("Q6_KM")
    assert caught.value.param == "quant"
    with pytest.raises(InvalidParameter, match="quant is 'awq'; known: "):
        find_recipe("awq")
