"""What the first load on a device would wait for, done ahead.

The code of kernels and libraries is loaded when it is first used, so small models without content go through
what a load and its steps go through.
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from helexa import ops
from helexa.engine.device import Device
from helexa.engine.engine import Engine
from helexa.engine.options import EngineOptions
from helexa.log import fields
from helexa.models import ModelConfig, build_model
from helexa.models.config import MoEConfig

logger = logging.getLogger(__name__)

# Of the sizes of most models where kernels differ by them: dimensions of a head, queries for each key.
_DENSE = ModelConfig(
    model_type="qwen3",
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=128,
    max_position_embeddings=1024,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    rotary_dim=128,
    attention_scale=128**-0.5,
    qk_norm=True,
)
_MIXTURE = replace(
    _DENSE,
    model_type="qwen3moe",
    intermediate_size=0,
    moe=MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=256, shared_intermediate_size=0),
)
_FORMATS = ("q4_k", "q6_k"), ("q8_0", "q8_0")  # of each layer's matrices, and of those that get more bits


def rehearse(devices: Iterable[Device]) -> None:
    """Has CUDA devices ready for a first load. What fails is left to that load, which will say why."""
    for device in devices:
        start = time.perf_counter()
        try:
            for config in (_DENSE, _MIXTURE):
                _run(config, device)
        except Exception as error:
            logger.info("device_not_rehearsed", extra=fields(device=device.name, error=error))
        else:
            seconds = round(time.perf_counter() - start, 3)
            logger.info("device_rehearsed", extra=fields(device=device.name, seconds=seconds))


def _run(config: ModelConfig, device: Device) -> None:
    options = EngineOptions(
        device=device.name, max_context=512, kv_cache_tokens=1024, max_sequences=8, prefix_cache=False
    )
    source = _Blank(config, device.tensors)
    with Engine(lambda: build_model(config, source), config, options, name="rehearsal") as engine:
        engine.logits([0, 1])


class _Blank:
    """The tensors of a model, all matrices zero and all vectors one."""

    def __init__(self, config: ModelConfig, device: torch.device):
        self._shapes = _shapes(config)
        self._device = device
        self._weights: dict[str, ops.PackedWeight] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def linear(self, name: str, blocks: ops.RowBlocks | None = None) -> ops.PackedWeight:
        assert blocks is None
        if name not in self._weights:
            rows, cols = self._shapes[name]
            weight = ops.empty_packed(_format(name), rows, cols, device=self._device)
            weight.data.zero_()
            self._weights[name] = weight
        return self._weights[name]

    table = linear

    def vector(self, name: str) -> Tensor:
        return torch.ones(self._shapes[name], device=self._device)


def _format(name: str) -> str:
    if "gate_inp" in name:
        return "f32"
    usual, more = _FORMATS[1 if name.startswith("blk.1.") else 0]
    return more if name.startswith("output") or "attn_v" in name or "ffn_down" in name else usual


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a model of qwen3 or qwen3moe, by their names in files."""
    size, head = config.hidden_size, config.head_dim
    query, key = config.num_attention_heads * head, config.num_key_value_heads * head
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (size,),
        "attn_q": (query, size),
        "attn_k": (key, size),
        "attn_v": (key, size),
        "attn_q_norm": (head,),
        "attn_k_norm": (head,),
        "attn_output": (size, query),
        "ffn_norm": (size,),
    }
    if (moe := config.moe) is None:
        rows = config.intermediate_size
        layer |= {"ffn_gate": (rows, size), "ffn_up": (rows, size), "ffn_down": (size, rows)}
    else:
        rows = moe.num_experts * moe.intermediate_size
        layer |= {"ffn_gate_exps": (rows, size), "ffn_up_exps": (rows, size)}
        layer["ffn_down_exps"] = moe.num_experts * size, moe.intermediate_size
        layer["ffn_gate_inp"] = moe.num_experts, size
    numbers = range(config.num_hidden_layers)
    shapes = {f"blk.{i}.{name}.weight": shape for i in numbers for name, shape in layer.items()}
    head_and_more = {"output_norm": (size,), "output": (config.vocab_size, size)}
    head_and_more["token_embd"] = config.vocab_size, size
    return shapes | {f"{name}.weight": shape for name, shape in head_and_more.items()}
