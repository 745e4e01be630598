"""Random weights in the file's formats, and what they stand for."""

import numpy as np
import torch

from helexa.quant import FORMATS

# Float16 fields of a block, where they are not its first one or two.
HALF_OFFSETS = {"q6_k": (208,), "q2_k": (80, 82), "q3_k": (108,)}
WITH_MINIMUM = ("q4_1", "q5_1", "q4_k", "q5_k")

QUANTIZED = [name for name in FORMATS if FORMATS[name].block_size > 1]


def random_raw(format: str, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Rows of random blocks in the file's layout, with scales of ordinary size."""
    rng = np.random.default_rng(seed)
    layout = FORMATS[format]
    if layout.block_size == 1:
        values = rng.standard_normal((rows, cols)).astype(np.float32)
        if format == "f32":
            return values.view(np.uint8).reshape(rows, -1)
        if format == "f16":
            return values.astype(np.float16).view(np.uint8).reshape(rows, -1)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(rows, -1)
    blocks = rng.integers(0, 256, (rows * cols // layout.block_size, layout.block_bytes), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.02, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    for i, offset in enumerate(HALF_OFFSETS.get(format, (0, 2) if format in WITH_MINIMUM else (0,))):
        blocks[:, offset : offset + 2] = scales[:, 2 * i : 2 * i + 2]
    return blocks.reshape(rows, -1)


def decoded(format: str, raw: np.ndarray, rows: int, cols: int) -> torch.Tensor:
    layout = FORMATS[format]
    values = layout.decode(raw.reshape(-1, layout.block_bytes)).reshape(rows, cols)
    return torch.from_numpy(values)
