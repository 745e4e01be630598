"""Routing and experts on a device against their references."""

import pytest
import torch

from helexa.ops.moe import moe_route, moe_route_reference

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(1, 1, 1), (3, 7, 7), (5, 128, 8), (13, 512, 10), (2, 33, 1), (70, 160, 6), (2, 1024, 32)],
)
def test_routes_are_those_of_the_reference(device, tokens, experts, top_k, normalize, assert_close):
    logits = torch.randn(tokens, experts) * 3
    ids = torch.full((tokens, top_k), -1, dtype=torch.int32, device=device)
    weights = torch.full((tokens, top_k), torch.nan, device=device)
    moe_route(logits.to(device), top_k, normalize=normalize, ids=ids, weights=weights)
    expected_ids, expected = moe_route_reference(logits, top_k, normalize=normalize)
    assert torch.equal(ids.cpu(), expected_ids)
    assert_close("weights", expected, weights.cpu(), 1e-6)


def test_equal_and_extreme_logits_are_routed_in_order(device, assert_close):
    logits = torch.zeros(4, 40)
    logits[0, ::2] = -0.0
    logits[1, 5:9] = 1.0
    logits[2] = torch.linspace(-3e4, 3e4, 40)
    logits[3, :39] = -torch.inf
    ids, weights = moe_route(logits.to(device), 4, normalize=True)
    assert ids.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [39, 38, 37, 36], [39, 0, 1, 2]]
    expected = torch.tensor([[0.25] * 4, [0.25] * 4, [1.0, 0, 0, 0], [1.0, 0, 0, 0]])
    assert_close("weights", expected, weights.cpu(), 1e-6)


def test_no_expert_beyond_the_last_is_chosen_for_what_is_not_a_number(device):
    ids, weights = moe_route(torch.full((2, 40), torch.nan, device=device), 3, normalize=True)
    assert ids.tolist() == [[0, 1, 2]] * 2
    assert weights.isnan().all()


def test_more_experts_than_a_device_takes_are_refused(device):
    with pytest.raises(ValueError, match="a device takes 32 of 1024"):
        moe_route(torch.zeros(1, 1100, device=device), 3, normalize=True)
