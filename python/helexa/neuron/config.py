"""neuron.toml as frozen data."""

import re
from dataclasses import dataclass, field, fields
from typing import Literal

from helexa.errors import InvalidParameter
from helexa.serving import TlsConfig, check_secret, is_loopback
from helexa.settings import LogConfig
from helexa.weights.recipes import find_recipe
from helexa.wire.control import LoadOptions

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")  # those of engine.device, which needs torch


@dataclass(frozen=True)
class NeuronSection:
    """[neuron]"""

    host: str = "127.0.0.1"
    port: int = 13131
    max_body_bytes: int = 64 * 2**20
    keep_alive_s: float = 1.0  # silence of a stream after which a comment shows that it is alive
    shutdown_grace_s: float = 30.0  # how long running requests may go on after a signal, or an unload
    park_bytes: int = 0  # of main memory, for the weights of models that have left a CUDA device

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be from 0 to 65535, not {self.port}")
        if self.max_body_bytes < 1024:
            raise ValueError(f"max_body_bytes must be at least 1024, not {self.max_body_bytes}")
        if self.keep_alive_s <= 0 or self.shutdown_grace_s < 0:
            raise ValueError("keep_alive_s must be positive and shutdown_grace_s not negative")
        if self.park_bytes < 0:
            raise ValueError(f"park_bytes must not be negative, not {self.park_bytes}")


@dataclass(frozen=True)
class AuthSection:
    """[auth]: whoever can use a neuron can have it read files, so on a network it needs a secret."""

    secret: str | None = field(default=None, metadata={"secret": True})  # that its gateways know
    open: bool = False  # whether it serves a network, which is trusted then, without one

    def __post_init__(self) -> None:
        check_secret("auth.secret", self.secret)


@dataclass(frozen=True)
class AdmissionSection:
    """[admission], for each model: requests that run, requests that wait, how long, and whose they are."""

    max_in_flight: int | None = None  # as many as the engine has sequences
    max_queue_depth: int = 16
    max_wait_s: float = 120.0
    max_per_principal: int | None = None  # running and waiting, of one key; all seats and 3/4 of the queue

    def __post_init__(self) -> None:
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise ValueError(f"max_in_flight must be at least 1, not {self.max_in_flight}")
        if self.max_queue_depth < 0 or self.max_wait_s <= 0:
            raise ValueError("max_queue_depth must not be negative and max_wait_s must be positive")
        if self.max_per_principal is not None and self.max_per_principal < 1:
            raise ValueError(f"max_per_principal must be at least 1, not {self.max_per_principal}")


@dataclass(frozen=True)
class PromptSection:
    """[prompt]: how conversations become prompts."""

    reuse_turns: bool = True  # continue from the exact tokens of answers given earlier
    turn_store_bytes: int = 64 * 2**20  # for those tokens, of all models

    def __post_init__(self) -> None:
        if self.turn_store_bytes < 0:
            raise ValueError(f"turn_store_bytes must not be negative, not {self.turn_store_bytes}")


@dataclass(frozen=True)
class StateCacheSection:
    """[state_cache]: what outlives the caches of a loaded model, if there is a path or memory for it."""

    host_bytes: int = 0  # of main memory, where they outlive the model
    path: str | None = None  # of a folder, where they outlive the process
    max_bytes: int = 32 * 2**30  # of that folder
    isolate_keys: bool = False  # whether prompts are shared within one API key only, in the caches too

    def __post_init__(self) -> None:
        for name in ("host_bytes", "max_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")

    @property
    def is_on(self) -> bool:
        return self.path is not None or self.host_bytes > 0


@dataclass(frozen=True, kw_only=True)
class EngineSection:
    """[engine]: how models run unless their own entry or the load request says otherwise."""

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
    quant: str | None = None  # by which models in F32, F16 or BF16 are quantized while they load
    quant_cache: bool | None = None  # whether the result is kept on disk

    def __post_init__(self) -> None:
        for name in ("max_context", "max_sequences", "kv_cache_tokens", "num_threads", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.device is not None and not _DEVICE.fullmatch(self.device):
            raise ValueError(f"device must be cpu, cuda:0, cuda:1, ... or auto, not {self.device!r}")
        if self.quant is not None:
            _check_quant(self.quant)

    @property
    def options(self) -> LoadOptions:
        return LoadOptions(**{item.name: getattr(self, item.name) for item in fields(EngineSection)})


@dataclass(frozen=True, kw_only=True)
class ModelEntry(EngineSection):
    """[[models]]: a model known here; its `source`, a path or a name to resolve, is by default the id."""

    id: str
    source: str | None = None
    load: bool = True  # as soon as the neuron listens

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.id.strip():
            raise ValueError("a model has an empty id")


@dataclass(frozen=True)
class NeuronConfig:
    """The whole file."""

    neuron: NeuronSection = NeuronSection()
    auth: AuthSection = AuthSection()
    tls: TlsConfig = field(default_factory=TlsConfig)
    admission: AdmissionSection = AdmissionSection()
    prompt: PromptSection = PromptSection()
    state_cache: StateCacheSection = StateCacheSection()
    engine: EngineSection = EngineSection()
    log: LogConfig = field(default_factory=LogConfig)
    models: tuple[ModelEntry, ...] = ()

    def __post_init__(self) -> None:
        ids = [model.id for model in self.models]
        if twice := next((name for name in ids if ids.count(name) > 1), None):
            raise ValueError(f"two models have the id {twice!r}")
        is_guarded = self.auth.secret or self.tls.client_ca or self.auth.open
        if not is_guarded and not is_loopback(self.neuron.host):
            raise ValueError(
                f"neuron.host is {self.neuron.host}, which other machines can reach: set auth.secret, which "
                "the gateway must know too, or tls.client_ca, or auth.open = true on a network that you trust"
            )


def _check_quant(name: str) -> None:
    try:
        find_recipe(name)
    except InvalidParameter as error:
        raise ValueError(error.message) from None


def merge_options(*layers: LoadOptions) -> dict[str, object]:
    """The options that are set, each from the first of `layers` that sets it."""
    merged: dict[str, object] = {}
    for layer in reversed(layers):
        values = {name: getattr(layer, name) for name in LoadOptions.__struct_fields__}
        merged |= {name: value for name, value in values.items() if value is not None}
    return merged
