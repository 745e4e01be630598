"""A layer of Qwen3.5-0.8B (16 heads) on the CPU; on a device those of 27B (48 heads) and 35B (32)."""

from collections.abc import Iterator

import torch
from bench.run import Case, rounds

from helexa import ops

KEY_HEADS, HEAD_DIM, TAPS = 16, 128, 4


def parameters(heads: int, device: str) -> ops.DeltaParameters:
    channels = (2 * KEY_HEADS + heads) * HEAD_DIM
    return ops.DeltaParameters(
        torch.randn(TAPS, channels, device=device) * 0.3,
        -torch.rand(heads, device=device) - 0.05,
        torch.randn(heads, device=device) * 0.1,
        torch.ones(HEAD_DIM, device=device),
        num_key_heads=KEY_HEADS,
        key_head_dim=HEAD_DIM,
        eps=1e-6,
        tiled=False,
    )


def case(heads: int, num_sequences: int, num_tokens: int, device: str) -> Case:
    """`num_tokens` more of each sequence, whose states are read and written once."""
    layer = parameters(heads, device)
    state_bytes = 4.0 * heads * HEAD_DIM * HEAD_DIM * num_sequences
    turns = rounds(2 * state_bytes) if device == "cuda" else range(1)
    slots = num_sequences * len(turns)
    conv_states, states = (torch.randn(shape, device=device) * 0.1 for shape in layer.state_shapes(slots))
    total = num_sequences * num_tokens
    is_wide = device == "cuda" and total > ops.MAX_MATVEC_ROWS
    x = torch.randn(total, layer.row, device=device, dtype=torch.bfloat16 if is_wide else torch.float32)
    places = torch.randperm(slots, dtype=torch.int32).to(device).chunk(len(turns))
    start = (torch.arange(num_sequences + 1, dtype=torch.int32) * num_tokens).to(device)
    lengths = torch.full((num_sequences,), 4096, dtype=torch.int32).to(device)

    def run() -> None:
        for place in places:
            ops.gated_delta_net(x, layer, conv_states, states, place, start, lengths)

    nbytes = 2 * state_bytes + x.nbytes + total * heads * HEAD_DIM * (2 if is_wide else 1)
    work = 6.0 * total * heads * HEAD_DIM * HEAD_DIM
    name = f"{heads} heads, {num_sequences} x {num_tokens} tokens"
    return Case(name, run, nbytes * len(turns), work * len(turns), len(turns))


def cases() -> Iterator[Case]:
    for num_sequences, num_tokens in ((1, 1), (4, 1), (1, 4), (1, 64), (1, 512)):
        yield case(16, num_sequences, num_tokens, "cpu")


def cuda_cases() -> Iterator[Case]:
    for heads in (48, 32):
        for num_sequences, num_tokens in ((1, 1), (2, 1), (4, 1), (8, 1), (1, 4), (1, 8), (1, 128), (1, 512)):
            yield case(heads, num_sequences, num_tokens, "cuda")
        yield case(heads, 1, 4096, "cuda")
