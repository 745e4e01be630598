"""What loading a model will need, checked against what there is before any weight is read."""

import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Protocol

from helexa import ops
from helexa.engine.cache import KEPT_FREE, kv_dtype, page_nbytes, state_nbytes
from helexa.engine.device import Device, find_devices
from helexa.engine.memory import available_bytes
from helexa.engine.options import EngineOptions
from helexa.engine.workspace import workspace_nbytes
from helexa.errors import OutOfMemory, UnsupportedModel
from helexa.layers.step import PAGE_TOKENS
from helexa.models import ModelConfig, kv_cache_shapes, state_shapes, table_names


class HasLayout(Protocol):
    """What is needed of a tensor's header: weights.gguf.TensorInfo."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def format(self) -> str: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


def place(
    tensors: Mapping[str, HasLayout], config: ModelConfig, options: EngineOptions
) -> tuple[EngineOptions, int]:
    """The options for the device that the model goes to, and bytes of the weights there.

    tensors: as they will be loaded, after quantization. Raises InvalidParameter for a device that cannot be
    used, and OutOfMemory or UnsupportedModel if the model fits none that may be used.
    """
    *others, last = find_devices(options.device)
    for device in others:
        with suppress(OutOfMemory, UnsupportedModel):
            return options.on(device), check_memory(tensors, config, options.on(device))
    return options.on(last), check_memory(tensors, config, options.on(last))


def check_memory(tensors: Mapping[str, HasLayout], config: ModelConfig, options: EngineOptions) -> int:
    """Bytes of the weights; raises OutOfMemory if they, states and cache cannot all fit the device, and
    UnsupportedModel for a model that is too wide for it.

    tensors: as they will be loaded, after quantization. The error says how many bytes are missing, and which
    context fits.
    """
    device = Device(options.device)
    if device.is_cuda and config.hidden_size > ops.MAX_CUDA_WIDTH:
        raise UnsupportedModel(
            f"the model's hidden size is {config.hidden_size}; CUDA devices take up to {ops.MAX_CUDA_WIDTH}"
        )
    weights = weight_nbytes(tensors, device, main_memory_tables(tensors, config, device))
    states = state_nbytes(state_shapes(config, options.max_sequences + 1))
    page = page_nbytes(kv_cache_shapes(config, 1), kv_dtype(options.kv_dtype, on_cuda=device.is_cuda))
    free = device.free_bytes() - reserved_nbytes(config, options, device)
    left = free - weights - states
    asked = max(options.kv_cache_tokens or 0, min(options.max_context or 0, config.max_position_embeddings))
    needed = (-(-max(asked, 1) // PAGE_TOKENS) + 1) * page
    missing = math.ceil(needed / (1 - KEPT_FREE)) - left
    if missing <= 0:
        return weights
    fitting = min((int(left * (1 - KEPT_FREE)) // page - 1) * PAGE_TOKENS, config.max_position_embeddings)
    what = f"a KV cache of {asked} tokens" if asked else "the smallest KV cache"
    advice = f"a context of {fitting} tokens fits" if fitting > 0 else "no context fits"
    state_words = f" and {states} bytes of states" if states else ""
    raise OutOfMemory(
        f"{weights} bytes of weights{state_words} with {what}, {needed} bytes, need {missing} bytes more "
        f"than the {max(free, 0)} bytes of memory that are free; {advice}",
        needed_bytes=weights + states + needed,
        free_bytes=max(free, 0),
        missing_bytes=missing,
    )


def reserved_nbytes(config: ModelConfig, options: EngineOptions, device: Device) -> int:
    """What is not for weights, states and cache: of main memory what others were promised, of a device's
    what the steps need."""
    return workspace_nbytes(config, options) if device.is_cuda else options.reserved_bytes


def main_memory_tables(
    tensors: Mapping[str, HasLayout], config: ModelConfig, device: Device
) -> frozenset[str]:
    """The tensors that stay in main memory though the model is on a device: steps look up few of their rows.

    None where devices cannot read main memory, or where there is too little of it.
    """
    names = table_names(config) & tensors.keys() if device.is_cuda else frozenset()
    needed = sum(tensors[name].nbytes for name in names)
    if not names or 2 * needed > available_bytes() or not ops.reads_main_memory(device.tensors):
        return frozenset()
    return names


def weight_nbytes(tensors: Mapping[str, HasLayout], device: Device, elsewhere: Collection[str] = ()) -> int:
    """Bytes of the tensors in memory, but for those elsewhere: matrices packed, vectors float32."""
    return sum(
        ops.packed_nbytes(info.format, info.num_rows, info.shape[-1], device.tensors)
        if len(info.shape) > 1
        else 4 * info.shape[0]
        for name, info in tensors.items()
        if name not in elsewhere
    )
