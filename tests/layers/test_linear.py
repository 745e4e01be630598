"""Names and shapes of the tensors that layers ask for."""

import numpy as np
import pytest
import torch

from helexa import ops
from helexa.errors import InvalidFile
from helexa.layers.linear import Linear, Scope

NAMES = {
    "lm_head": "output",
    "model.layers.{}.mlp.up_proj": "blk.{}.up",
    "model.layers.{}.norm": "blk.{}.norm",
}


class Arrays(dict):
    """A source of float32 arrays."""

    def linear(self, name):
        return ops.pack_weight("f32", self[name].tobytes(), *self[name].shape)

    table = linear

    def vector(self, name):
        return torch.from_numpy(self[name])


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_a_scope_speaks_the_names_of_the_file():
    root = Scope(Arrays(), NAMES)
    assert root.file_name("lm_head.weight") == "output.weight"
    layer = root / "model" / "layers" / 12
    assert layer.file_name("norm.weight") == "blk.12.norm.weight"
    assert (layer / "mlp").file_name("up_proj.bias") == "blk.12.up.bias"


def test_a_scope_knows_what_the_file_has():
    root = Scope(Arrays({"output.bias": random(3)}), NAMES)
    assert "lm_head.bias" in root
    assert "lm_head.weight" not in root


def test_a_missing_tensor_is_named_with_the_expected_shape():
    with pytest.raises(
        InvalidFile, match=r"tensor 'output\.weight' is missing; expected one of shape \[3, 4\]"
    ):
        Scope(Arrays(), NAMES).matrix("lm_head", 3, 4)
    with pytest.raises(InvalidFile, match=r"tensor 'output\.bias' is missing; expected one of shape \[3\]"):
        Scope(Arrays(), NAMES).vector("lm_head.bias", 3)


def test_a_misshapen_tensor_is_named_with_both_shapes():
    scope = Scope(Arrays({"output.weight": random(4, 3), "output.bias": random(4)}), NAMES)
    with pytest.raises(InvalidFile, match=r"tensor 'output\.weight' has shape \[4, 3\], expected \[3, 4\]"):
        scope.matrix("lm_head", 3, 4)
    with pytest.raises(InvalidFile, match=r"tensor 'output\.bias' has shape \[4\], expected \[3\]"):
        scope.vector("lm_head.bias", 3)


def test_modules_that_share_an_input_stand_side_by_side():
    names = {"q": "q", "k": "k", "v": "v"}
    arrays = {
        "q.weight": random(7, 20),
        "k.weight": random(3, 20),
        "v.weight": random(5, 20),
        "k.bias": random(3),
    }
    linear = Linear.load(Scope(Arrays(arrays), names), 20, {"q": 7, "k": 3, "v": 5})
    x = random(6, 20)
    expected = np.hstack(
        [x @ arrays["q.weight"].T, x @ arrays["k.weight"].T + arrays["k.bias"], x @ arrays["v.weight"].T]
    )
    np.testing.assert_allclose(linear(torch.from_numpy(x)), expected, atol=1e-5)


def test_a_bias_that_must_be_there_is_asked_for():
    scope = Scope(Arrays({"output.weight": random(4, 3)}), NAMES)
    assert Linear.load(scope, 3, {"lm_head": 4}).biases is None
    with pytest.raises(InvalidFile, match=r"'output\.bias' is missing"):
        Linear.load(scope, 3, {"lm_head": 4}, bias=True)
