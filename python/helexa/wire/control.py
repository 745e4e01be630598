"""The neuron's control API: what it is, how it feels, which models it has, and how to load and unload them.

Sizes are bytes, times seconds, absent means unknown. Answers may grow fields, so readers ignore what they do
not know; requests with unknown fields are refused.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

ModelId = Annotated[str, Meta(max_length=512)]
Source = Annotated[str, Meta(max_length=4096)]  # path or name
ModelStatus = Literal["unloaded", "loading", "loaded", "unloading", "failed", "poisoned"]


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of everything a neuron answers."""


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base of everything a neuron is asked."""


# GET /version


class VersionInfo(Answer, frozen=True):
    version: str
    python_version: str
    torch_version: str | None = None


# GET /discovery


class Cpu(Answer, frozen=True):
    name: str
    cores: int  # physical
    threads: int  # that this process may run on
    instruction_sets: list[str]
    memory_total_bytes: int


class Device(Answer, frozen=True):
    index: int
    name: str
    memory_total_bytes: int
    compute_capability: str | None = None


class Discovery(Answer, frozen=True):
    hostname: str
    os: str
    kernel: str
    cpu: Cpu
    devices: list[Device]  # CUDA devices; an empty list is a CPU node
    driver_version: str | None = None
    cuda_version: str | None = None
    cuda_unavailable_reason: str | None = None  # set when a driver is there but unusable


# GET /health


class LoadFailure(Answer, frozen=True):
    model_id: str
    code: str
    error: str


class Activation(Answer, frozen=True):
    """How far the default models are."""

    state: Literal["pre_warming", "ready"]
    pending: list[str] = []
    in_progress: str | None = None
    completed: list[str] = []
    failed: list[LoadFailure] = []


class ModelLoad(Answer, frozen=True):
    """How busy one loaded model is; the counters start at zero with each load."""

    id: str
    in_flight: int = 0
    queue_depth: int = 0
    max_in_flight: int = 0
    max_queue_depth: int = 0
    rejected_queue_full: int = 0
    rejected_timeout: int = 0
    rejected_per_principal: int = 0
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0
    kv_tokens_cached: int = 0
    snapshots_used: int = 0
    snapshots_total: int = 0
    stored_tokens: int = 0
    tok_s_prefill: float = 0.0
    tok_s_decode: float = 0.0
    poisoned: str | None = None


class DeviceHealth(Answer, frozen=True):
    index: int
    memory_used_bytes: int
    memory_free_bytes: int
    utilization_percent: int | None = None
    temperature_c: int | None = None


class Health(Answer, frozen=True):
    """`degraded`: a model is poisoned or a default model failed to load; `draining`: new work is refused."""

    status: Literal["ok", "degraded", "draining"]
    uptime_s: float
    memory_available_bytes: int
    activation: Activation
    models: list[ModelLoad]
    devices: list[DeviceHealth] = []
    unaccounted_bytes: int = 0  # main memory that the process holds beyond that of its models
    reason: str | None = None  # why it is draining


# GET /models


class Limit(Answer, frozen=True):
    context: int  # tokens of prompt and answer together
    output: int | None = None


class Progress(Answer, frozen=True):
    phase: str  # queued, resolve, quantize, header, weights, ready
    percent: float
    remaining_s: float | None = None  # an estimate


class ErrorInfo(Answer, frozen=True):
    code: str
    message: str
    status: int = 500


class ModelInfo(Answer, frozen=True):
    id: str
    status: ModelStatus
    source: str  # path or name it was loaded from
    device: str = "cpu"
    devices: list[int] = []
    architecture: str | None = None
    memory_bytes: int | None = None
    capabilities: list[str] = []
    limit: Limit | None = None
    tool_call: bool = False
    reasoning: bool = False
    loaded_at: int | None = None  # Unix time
    load_seconds: float | None = None
    progress: Progress | None = None  # while loading
    error: ErrorInfo | None = None  # of the last load, when failed; of the device, when poisoned


# POST /models/load, /models/unload


class LoadOptions(Request, frozen=True):
    """How to run a model; None leaves the choice to the neuron."""

    device: str | None = None
    max_context: int | None = None
    max_sequences: int | None = None
    kv_dtype: Literal["float32", "float16", "bfloat16", "float8_e4m3", "int8"] | None = None
    kv_cache_tokens: int | None = None
    num_threads: int | None = None
    prefill_chunk: int | None = None
    prefix_cache: bool | None = None
    snapshot_bytes: int | None = None
    step_timeout_s: float | None = None
    quant: str | None = None
    quant_cache: bool | None = None


class LoadRequest(Request, frozen=True):
    """`source` is a path or name to resolve; without one, the configured model of that id or the id."""

    model_id: ModelId
    source: Source | None = None
    options: LoadOptions = LoadOptions()
    wait: bool = False  # answer when the load has ended (200) instead of at once (202)


class UnloadRequest(Request, frozen=True):
    """Requests in flight may finish for `drain_s`; then they are ended with an error."""

    model_id: ModelId
    drain_s: float | None = None


class DefragReply(Answer, frozen=True):
    """POST /defrag: all models were unloaded and loaded again."""

    freed_bytes: int  # less than zero if the process has grown


class UnloadReply(Answer, frozen=True):
    model_id: str
    status: Literal["unloaded"] = msgspec.field(
        default_factory=lambda: "unloaded"
    )  # a factory: never omitted
