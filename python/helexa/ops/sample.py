"""The choice of the next tokens on a device, with the rules of the engine's sampler."""

import numpy as np
import torch
from torch import Tensor

from helexa import _C
from helexa.ops.tensor import check, on_cuda, stream

MAX_VOCABULARY = 1 << 18
MAX_TOP = 20

# csrc/ops/sample.h says what the fields mean.
SAMPLE_PARAMETERS = np.dtype(
    [
        *((name, np.float64) for name in ("top_p", "typical_p", "presence_penalty")),
        *((name, np.uint64) for name in ("seed", "counts", "bias")),
        *((name, np.float32) for name in ("temperature", "min_p", "repetition_penalty", "frequency_penalty")),
        *((name, np.int32) for name in ("top_k", "num_top")),
    ]
)
SAMPLE_RECORD = np.dtype(
    [
        *((name, np.int32) for name in ("token_id", "status", "position", "num_top")),
        *((name, np.float32) for name in ("peak", "logit", "largest")),
        ("asked", np.int32),
        ("total", np.uint64),
        ("top_ids", np.int32, MAX_TOP),
        ("top_gaps", np.float32, MAX_TOP),
    ]
)
SAMPLED, NOT_FINITE, FORCED = range(3)  # status
ANY_TOKEN, MASKED_TOKENS = -1, -2  # what `forced` says besides a token
WEIGHT_ONE = 2.0**41  # of `total`


def sample(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    *,
    parameters: Tensor,
    forced: Tensor,
    masks: Tensor,
    last_tokens: Tensor,
    records: Tensor,
    workspace: Tensor,
    greedy_only: bool = False,
) -> None:
    """Chooses a token for each row: into last_tokens[slots[r]], records[r] and the counts of the slot.

    logits: [R, V] float32.   slots: [R] int32, who owns a row.   positions: [R] int32, of the tokens that the
    logits follow.   Per slot: parameters [S, bytes] uint8 (SAMPLE_PARAMETERS), forced [S] int32 (a token, or
    ANY_TOKEN or MASKED_TOKENS), masks [S, words] int32 (bit i % 32 of word i / 32: token i may come),
    last_tokens [S] int32.   records: [max_rows, words] int32 (SAMPLE_RECORD).   workspace: uint8, from
    sample_workspace.   greedy_only: no row has a temperature above 0 or wants logits reported.
    Raises ValueError if a shape or dtype does not fit.  Capturable: allocates nothing.
    """
    num_rows, vocab_size = logits.shape
    max_rows, num_slots = records.shape[0], last_tokens.shape[0]
    check(on_cuda(logits), "sample: logits are on the CPU, where helexa.engine.sampler chooses")
    _check("logits", logits, (num_rows, vocab_size), torch.float32)
    _check("slots", slots, (num_rows,), torch.int32)
    _check("positions", positions, (num_rows,), torch.int32)
    _check("parameters", parameters, (num_slots, SAMPLE_PARAMETERS.itemsize), torch.uint8)
    _check("forced", forced, (num_slots,), torch.int32)
    _check("masks", masks, (num_slots, -(-vocab_size // 32)), torch.int32)
    _check("last_tokens", last_tokens, (num_slots,), torch.int32)
    _check("records", records, (max_rows, SAMPLE_RECORD.itemsize // 4), torch.int32)
    _check("workspace", workspace, (_C.sample_workspace_bytes(max_rows, vocab_size),), torch.uint8)
    check(
        num_rows <= max_rows and 0 < vocab_size <= MAX_VOCABULARY,
        f"sample: {num_rows} rows of {vocab_size} logits; expected up to {max_rows} of {MAX_VOCABULARY}",
    )
    _C.sample_cuda(
        *(logits.data_ptr(), slots.data_ptr(), positions.data_ptr(), parameters.data_ptr()),
        *(forced.data_ptr(), masks.data_ptr(), masks.shape[1], last_tokens.data_ptr()),
        *(records.data_ptr(), workspace.data_ptr(), max_rows, num_rows, vocab_size),
        greedy_only,
        stream(logits),
    )


def sample_workspace(max_rows: int, vocab_size: int, device: torch.device) -> Tensor:
    """What `sample` needs for up to max_rows rows and leaves as it found it: zeros where it matters."""
    return torch.zeros(sample_workspace_bytes(max_rows, vocab_size), dtype=torch.uint8, device=device)


def sample_workspace_bytes(max_rows: int, vocab_size: int) -> int:
    """Its size."""
    return _C.sample_workspace_bytes(max_rows, vocab_size)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(
        tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous(),
        f"sample: {name} {tuple(tensor.shape)} {tensor.dtype} is not a contiguous {shape} {dtype}",
    )
