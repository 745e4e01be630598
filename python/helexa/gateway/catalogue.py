"""models.toml: which models the fleet may serve, what they need and what they are called."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from helexa.errors import ConfigError
from helexa.settings import load_settings
from helexa.wire.control import LoadOptions, LoadRequest

DEFAULT_RANK = 100
PINNED_RANK = 1000


@dataclass(frozen=True)
class Limit:
    """Tokens; shown until a neuron has told its own."""

    context: int
    input: int | None = None
    output: int | None = None


@dataclass(frozen=True)
class Cost:
    """USD per million tokens; 0.0 is free on purpose, absent is not priced."""

    input: float
    output: float
    cache_read: float | None = None
    cache_write: float | None = None


@dataclass(frozen=True)
class ModelEntry:
    """[[models]]"""

    id: str
    path: str | None = None  # of a file or folder on the neuron's host
    name: str | None = None  # what the neuron fetches: starter, org/repo, org/repo:quant
    source: str | None = None  # scheme put before name or id: source:org/repo
    quant: str | None = (
        None  # put behind name or id: org/repo:quant; of a path, how to quantize what is there
    )
    vram_mb: int = 0  # MiB needed in all; 0 is unknown
    min_devices: int = 1
    min_device_vram_mb: int = 0
    pinned_on: tuple[str, ...] = ()
    residency_priority: int | None = None
    idle_ttl_s: float | None = None  # unloaded after so long without a request; 0: never; None: [eviction]
    limit: Limit | None = None
    cost: Cost | None = None
    capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("a model's id must not be empty")
        if self.path and (self.name or self.source):
            raise ValueError(f"model {self.id!r}: path excludes name and source")
        if self.min_devices < 1 or self.vram_mb < 0 or self.min_device_vram_mb < 0:
            raise ValueError(f"model {self.id!r}: min_devices must be at least 1, sizes at least 0")
        if self.idle_ttl_s is not None and self.idle_ttl_s < 0:
            raise ValueError(f"model {self.id!r}: idle_ttl_s must not be negative")

    @property
    def rank(self) -> int:
        """The residency class: a model may displace models of its own class and below."""
        if self.residency_priority is not None:
            return self.residency_priority
        return PINNED_RANK if self.pinned_on else DEFAULT_RANK

    @property
    def need_bytes(self) -> int:
        return self.vram_mb * 2**20

    def load_request(self) -> LoadRequest:
        """What a neuron is told to load this model, which it registers under `id` wherever it comes from."""
        if self.path:
            request = LoadRequest(model_id=self.id, source=self.path, wait=True)
            options = LoadOptions(quant=self.quant)
            return msgspec.structs.replace(request, options=options) if self.quant else request
        if not (self.name or self.source or self.quant):
            return LoadRequest(model_id=self.id, wait=True)
        parts = (self.source, self.name or self.id, self.quant)
        return LoadRequest(model_id=self.id, source=":".join(part for part in parts if part), wait=True)


@dataclass(frozen=True)
class _CatalogueFile:
    models: tuple[ModelEntry, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Catalogue:
    """The models by id and the aliases, which do not chain."""

    models: Mapping[str, ModelEntry] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def resolve(self, name: str) -> str:
        return self.aliases.get(name, name)

    def rank(self, model: str) -> int:
        entry = self.models.get(model)
        return entry.rank if entry else DEFAULT_RANK


def load_catalogue(path: Path) -> Catalogue:
    """The catalogue in the file. Raises ConfigError that names file and key."""
    file = load_settings(_CatalogueFile, path, environ={})
    models = {entry.id: entry for entry in file.models}
    if len(models) < len(file.models):
        twice = next(entry.id for entry in file.models if models[entry.id] is not entry)
        raise ConfigError(f"{path}: models: {twice!r} is listed twice")
    for alias, target in file.aliases.items():
        if alias in models:
            raise ConfigError(f"{path}: aliases.{alias}: a model has this id")
        if target in file.aliases:
            raise ConfigError(f"{path}: aliases.{alias}: {target!r} is an alias itself; name a model")
    return Catalogue(models, file.aliases)
