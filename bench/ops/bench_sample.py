"""The choice of the next tokens of 1 and 8 sequences from 151,936 logits, peaked and nearly flat."""

from collections.abc import Iterator

import numpy as np
import torch
from bench.run import Case

from helexa.ops.sample import ANY_TOKEN, SAMPLE_PARAMETERS, SAMPLE_RECORD, sample, sample_workspace

VOCABULARY, CALLS = 151936, 20
SETTINGS = {
    "greedy": {},
    "top_p 0.95, top_k 20": {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    "top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "min_p 0.05": {"temperature": 1.0, "min_p": 0.05},
}


def case(name: str, num_rows: int, spread: float, device: str) -> Case:
    wanted = np.zeros(num_rows, SAMPLE_PARAMETERS)
    for field, value in {"top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, **SETTINGS[name]}.items():
        wanted[field] = value
    parameters = torch.from_numpy(wanted.view(np.uint8).reshape(num_rows, -1)).to(device)
    logits = torch.randn(num_rows, VOCABULARY, device=device) * spread
    slots, positions, last = (torch.arange(num_rows, dtype=torch.int32).to(device) for _ in range(3))
    forced = torch.full((num_rows,), ANY_TOKEN, dtype=torch.int32).to(device)
    masks = torch.zeros(num_rows, -(-VOCABULARY // 32), dtype=torch.int32).to(device)
    records = torch.zeros(num_rows, SAMPLE_RECORD.itemsize // 4, dtype=torch.int32).to(device)
    workspace = sample_workspace(num_rows, VOCABULARY, torch.device(device))

    def run() -> None:
        for _ in range(CALLS):
            sample(
                *(logits, slots, positions),
                parameters=parameters,
                forced=forced,
                masks=masks,
                last_tokens=last,
                records=records,
                workspace=workspace,
                greedy_only=name == "greedy",
            )

    label = f"{name}, {num_rows} rows, {'peaked' if spread > 1 else 'flat'}"
    return Case(label, run, float(CALLS * logits.nbytes), 0.0, CALLS)


def cuda_cases() -> Iterator[Case]:
    for name in SETTINGS:
        for num_rows in (1, 8):
            for spread in (4.0, 0.1):
                yield case(name, num_rows, spread, "cuda")
