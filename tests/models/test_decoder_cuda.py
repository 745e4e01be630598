"""Golden parity with transformers through the CUDA kernels.

Up to 16 rows, these round the input of a matmul to int8 (blocks of 32 values with one scale), as the CPU does
for quantized weights; beyond, they multiply in bfloat16. The weights of the golden models are float32, so the
error is that of this rounding, over a few layers: a hundredth of the root mean square. Where a token hangs
between two experts, rounding may send it to the other one, so the bound holds for most rows of these models.
"""

from collections.abc import Iterator

import pytest
import torch

from support.model_runs import CASES, Caches, error_ratio, golden, run

pytestmark = pytest.mark.cuda

TOLERANCE = 0.03  # of the root mean square
OTHER_EXPERTS = 0.15  # the same over all rows, some of which went to other experts
SHORT = ["llama", "qwen2_tied", "qwen3", "qwen3moe", "qwen3next", "qwen35_tied", "qwen35moe"]


def is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Most rows within the tolerance, and those of other experts not far off."""
    errors = torch.tensor([error_ratio(*rows) for rows in zip(found, expected, strict=True)])
    return float(errors.median()) < TOLERANCE and error_ratio(found, expected) < OTHER_EXPERTS


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("case", CASES)
def test_many_rows_give_the_logits_of_transformers(case, cuda_device):
    expected = golden(case, cuda_device)
    logits = run(expected.build(), expected.token_ids, device=cuda_device)
    assert logits.dtype == torch.float32
    if expected.config.moe is None:
        assert error_ratio(logits, expected.logits) < TOLERANCE
    assert is_close(logits, expected.logits)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("case", SHORT)
def test_few_rows_at_a_time_give_the_logits_of_transformers(case, chunk, cuda_device):
    expected = golden(case, cuda_device)
    tokens = expected.token_ids[: 16 if chunk == 1 else 70]
    logits = run(expected.build(), tokens, chunk, cuda_device)
    assert is_close(logits, expected.logits[: len(tokens)])


@pytest.mark.parametrize("case", SHORT)
def test_sequences_of_different_lengths_decode_together_bit_for_bit_as_alone(case, cuda_device):
    expected = golden(case, cuda_device)
    model, streams = expected.build(), [expected.token_ids, expected.token_ids.flip(0)]
    lengths = [3, 33]
    together = Caches(expected.config, num_sequences=2, device=cuda_device)
    alone = [Caches(expected.config, num_sequences=2, device=cuda_device) for _ in streams]
    for number, (stream, length) in enumerate(zip(streams, lengths, strict=True)):
        for caches in (together, alone[number]):
            model(caches.step({number: stream[:length]}, slice(length - 1, length)))
    for offset in range(3):
        parts = {
            number: stream[length + offset : length + offset + 1]
            for number, (stream, length) in enumerate(zip(streams, lengths, strict=True))
        }
        rows = model(together.step(parts))
        for number, part in parts.items():
            assert torch.equal(rows[number], model(alone[number].step({number: part}))[0])


@pytest.mark.parametrize("case", ["qwen3", "qwen35moe"])
def test_hidden_states_are_those_that_the_logits_are_made_of(case, cuda_device):
    expected = golden(case, cuda_device)
    model = expected.build()
    step = Caches(expected.config, device=cuda_device).step({0: expected.token_ids[:9]}, slice(8, 9))
    hidden = model.hidden(step)
    assert hidden.shape == (1, expected.config.hidden_size)
    assert hidden.dtype == torch.float32
    head = model.lm_head.weights[0].dequantize()
    assert error_ratio(hidden @ head.T, expected.logits[8:9]) < TOLERANCE


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("qwen3", {"rope_interleaved": True}),
        ("qwen3", {"qk_norm": False}),
        ("qwen3", {"attention_scale": 1 / 8}),
        ("qwen3", {"rope_theta": 20000.0}),
        ("llama", {"rope_interleaved": False}),
    ],
)
def test_a_wrong_configuration_is_noticed(case, changes, cuda_device):
    expected = golden(case, cuda_device)
    logits = run(expected.build(**changes), expected.token_ids[:40], device=cuda_device)
    assert error_ratio(logits, expected.logits[:40]) > 2 * TOLERANCE
