"""How a model is served, and how it stands."""

from dataclasses import dataclass, replace
from typing import Self

from helexa.engine.device import Device, check_device_name
from helexa.errors import InvalidParameter
from helexa.weights.recipes import find_recipe

# Tokens. On a device, larger chunks gain no speed and take more memory for activations; beside running
# streams the scheduler takes smaller ones.
CPU_CHUNK, CUDA_CHUNK = 512, 2048
CPU_LIMIT_S, CUDA_LIMIT_S = 900.0, 60.0  # far beyond the longest step of a model that fits


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a model is served. Sizes left open are chosen by the free memory, see cache.plan_capacity.

    device: cpu, cuda:N, cuda for the first one, or auto for the first one that has room, or else the CPU.
    """

    device: str = "cpu"
    max_context: int | None = None
    max_sequences: int = 4
    kv_dtype: str = "bfloat16"
    kv_cache_tokens: int | None = None
    num_threads: int | None = None  # None: one for each physical core that the process may use
    prefill_chunk: int | None = None  # tokens; None: 512, on a CUDA device 2048
    prefix_cache: bool = True
    snapshot_bytes: int | None = None  # of memory for states of recurrent layers; None: by what is free
    step_timeout_s: float | None = (
        None  # after which a step is taken for hung; None: 900, on a CUDA device 60
    )
    quant: str | None = None  # a recipe, by which a model in F32, F16 or BF16 is quantized while it loads
    quant_cache: bool = True  # keep the result on disk
    reserved_bytes: int = 0  # of the free memory, promised to others in this process
    capture: bool = True  # replay decode steps; off for models that compute outside helexa.ops

    def __post_init__(self) -> None:
        check_device_name(self.device)
        for name in ("max_context", "max_sequences", "kv_cache_tokens", "num_threads", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidParameter(f"{name} is {value!r}; expected a positive integer", param=name)
        # Each takes memory by itself.
        for name, most in (("max_sequences", 1024), ("num_threads", 1024), ("prefill_chunk", 1 << 15)):
            value = getattr(self, name)
            if value is not None and value > most:
                raise InvalidParameter(f"{name} is {value}; expected at most {most}", param=name)
        if self.step_timeout_s is not None and not self.step_timeout_s > 0:
            raise InvalidParameter(
                f"step_timeout_s is {self.step_timeout_s!r}; expected a positive number",
                param="step_timeout_s",
            )
        if self.quant is not None:
            find_recipe(self.quant)

    def on(self, device: Device) -> Self:
        """These options for a certain device."""
        return replace(self, device=device.name)

    @property
    def step_limit_s(self) -> float:
        """How long a step may take before the device is taken for hung."""
        return self.step_timeout_s or (CUDA_LIMIT_S if Device(self.device).is_cuda else CPU_LIMIT_S)

    @property
    def prefill_tokens(self) -> int:
        """How many tokens of a prompt are computed in one step, at most."""
        return self.prefill_chunk or (CUDA_CHUNK if Device(self.device).is_cuda else CPU_CHUNK)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The state of an engine at a glance; totals count from the load."""

    in_flight: int
    queued: int
    kv_tokens_total: int
    kv_tokens_used: int  # in pages that sequences hold
    kv_tokens_cached: int  # in pages that only the prefix cache keeps
    prefill_tok_s: float
    decode_tok_s: float  # over all sequences of a batch
    prefill_tokens: int
    decode_tokens: int
    cached_tokens: int
    stored_tokens: int  # of these, what came from the state store
    snapshots_used: int
    snapshots_total: int  # slots for them
    preemptions: int
    poisoned: str | None
