"""How products of matrices are judged, and what is hard for them."""

import torch

# The bytes of a block's codes, and the byte whose codes are furthest from zero.
LARGEST_CODES = {
    "q4_0": (slice(2, None), 0x00), "q4_1": (slice(4, None), 0xFF), "q5_1": (slice(4, None), 0xFF),
    "q8_0": (slice(2, None), 0x7F), "q2_k": (slice(16, 80), 0xFF), "q3_k": (slice(0, 96), 0x00),
    "q4_k": (slice(16, None), 0xFF), "q5_k": (slice(16, None), 0xFF), "q6_k": (slice(0, 192), 0x00),
    "iq4_nl": (slice(2, None), 0x00), "iq4_xs": (slice(8, None), 0x00),
}  # fmt: skip


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the root mean square of the truth."""
    assert not actual.isnan().any()
    return float((actual - expected).abs().max() / expected.square().mean().sqrt())
