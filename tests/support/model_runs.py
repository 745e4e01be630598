"""Models run on tokens as the engine runs them, and what transformers computed with those of tests/golden."""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helexa.layers.norm import RMSNorm
from helexa.layers.step import PAGE_TOKENS, Step
from helexa.models import Model, ModelConfig, build_model, config_from_gguf, kv_cache_shapes, state_shapes
from helexa.models.decoder_layer import DecoderLayer
from helexa.ops import Rows
from helexa.weights.load import GGUFWeights
from helexa.weights.model_file import open_model

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(json.loads((GOLDEN / "manifest.json").read_text())["cases"])
TOLERANCE = 1e-4  # of the root mean square; transformers and these kernels differ by about 1e-6


@dataclass
class Golden:
    """A tiny model's file and what transformers computed with it."""

    config: ModelConfig
    weights: GGUFWeights
    token_ids: Tensor  # [T] int32
    hidden: Tensor  # [layers, T, hidden_size], the output of each layer
    logits: Tensor  # [T, vocab_size]

    def build(self, **changes: Any) -> Model:
        """The model, with changes to its configuration."""
        model = build_model(replace(self.config, **changes), self.weights)
        self.weights.finish()
        return model


class Caches:
    """KV caches of a few sequences on scattered pages.  All starts as NaN, so that reading too far shows."""

    def __init__(
        self,
        config: ModelConfig,
        num_sequences: int = 1,
        pages_each: int = 2,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ):
        self.device = device
        num_pages = num_sequences * pages_each + 1  # the first page belongs to nobody
        shapes = kv_cache_shapes(config, num_pages)
        self.k, self.v = (
            [torch.full(shape, float("nan"), dtype=dtype, device=device) for shape in shapes]
            for _ in range(2)
        )
        order = torch.randperm(num_pages - 1, generator=torch.Generator().manual_seed(1)) + 1
        self.pages = order.to(torch.int32).reshape(num_sequences, pages_each)
        self.lengths = [0] * num_sequences
        states = state_shapes(config, num_sequences + 1)  # the last slot belongs to nobody
        self.conv_states = [torch.full(conv, float("nan"), device=device) for conv, _ in states]
        self.states = [torch.full(state, float("nan"), device=device) for _, state in states]

    def step(self, parts: dict[int, Tensor], logits_rows: slice | None = None) -> Step:
        """The step that appends `parts`, sequence -> token ids; by default all rows want logits."""
        token_ids, positions, slots, starts = [], [], [], [0]
        for sequence, tokens in parts.items():
            position = torch.arange(len(tokens), dtype=torch.int32) + self.lengths[sequence]
            page = self.pages[sequence][(position // PAGE_TOKENS).long()]
            token_ids.append(tokens.to(torch.int32))
            positions.append(position)
            slots.append(page * PAGE_TOKENS + position % PAGE_TOKENS)
            starts.append(starts[-1] + len(tokens))
            self.lengths[sequence] += len(tokens)
        return Step(
            token_ids=torch.cat(token_ids).to(self.device),
            positions=torch.cat(positions).to(self.device),
            slots=torch.cat(slots).to(self.device),
            query_start=torch.tensor(starts, dtype=torch.int32, device=self.device),
            kv_lengths=torch.tensor(
                [self.lengths[sequence] for sequence in parts], dtype=torch.int32, device=self.device
            ),
            page_table=self.pages[list(parts)].contiguous().to(self.device),
            k_cache=self.k,
            v_cache=self.v,
            logits_rows=slice(0, starts[-1]) if logits_rows is None else logits_rows,
            state_slots=torch.tensor(list(parts), dtype=torch.int32, device=self.device),
            conv_states=self.conv_states,
            states=self.states,
        )


def run(model: Model, token_ids: Tensor, chunk: int | None = None, device: str = "cpu") -> Tensor:
    """Logits [T, vocab_size] of one sequence, in one step or in steps of `chunk` tokens."""
    num_pages = max(2, -(-len(token_ids) // PAGE_TOKENS))
    caches = Caches(model.config, pages_each=num_pages, device=device)
    return torch.cat([model(caches.step({0: part})) for part in token_ids.split(chunk or len(token_ids))])


def error_ratio(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`; NaN and infinities count as infinite."""
    difference = (found.double().cpu() - expected.double().cpu()).square().mean().sqrt()
    ratio = float(difference / expected.double().cpu().square().mean().sqrt())
    return ratio if np.isfinite(ratio) else float("inf")


def load(path: Path, device: str = "cpu") -> tuple[ModelConfig, GGUFWeights]:
    file = open_model(path)
    return config_from_gguf(file.metadata, file.tensors), GGUFWeights(file, device=device)


@cache
def golden(case: str, device: str = "cpu") -> Golden:
    arrays = np.load(GOLDEN / f"{case}.npz")
    config, weights = load(GOLDEN / f"{case}.gguf", device)
    return Golden(config, weights, **{name: torch.from_numpy(arrays[name]) for name in arrays})


class Recorder:
    """Stands in for a layer and keeps what the layer returned."""

    def __init__(self, layer: DecoderLayer):
        self.layer = layer
        self.input_layernorm = layer.input_layernorm
        self.output: Tensor | None = None

    def __call__(
        self, x: Rows, residual: Tensor, rope: Tensor, step: Step, rows: slice, norm: RMSNorm
    ) -> Rows:
        normed = self.layer(x, residual, rope, step, rows, norm)
        self.output = residual[rows].clone()
        return normed


def with_recorders(model: Model) -> list[Recorder]:
    """Records what each layer of the model returns from now on."""
    recorders = [Recorder(layer) for layer in model.model.layers]
    model.model.layers = recorders
    return recorders
