"""The gate against its reference, at odd sizes and extreme values."""

import pytest
import torch

from helexa.ops.sigmoid_mul import sigmoid_mul, sigmoid_mul_reference


@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (1, 16), (2, 4097), (700, 33)])
def test_it_equals_the_reference_on_every_instruction_set(isa, shape, assert_close):
    x, gate = torch.randn(shape), torch.randn(shape) * 4
    expected = sigmoid_mul_reference(x.clone(), gate)
    assert sigmoid_mul(x, gate) is x
    assert_close("x", expected, x, 1e-6)


def test_extreme_gates_open_and_close(isa):
    x = torch.ones(5)
    assert sigmoid_mul(x, torch.tensor([-200.0, -50.0, 0.0, 50.0, 200.0])).tolist() == pytest.approx(
        [0, 0, 0.5, 1, 1], abs=1e-20
    )


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="gate"):
        sigmoid_mul(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="gate"):
        sigmoid_mul(torch.ones(3), torch.ones(3).double())
