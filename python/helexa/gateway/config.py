"""gateway.toml as frozen data. Docs: docs/configuration.md."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from helexa.errors import ConfigError
from helexa.gateway.catalogue import Catalogue, load_catalogue
from helexa.serving import TlsConfig, check_secret
from helexa.settings import LogConfig, load_settings, user_folder

KEYS_FILE = "keys.jsonl"


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "127.0.0.1:31313", "[::1]:31313" or ":31313" (every interface). Raises ValueError."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is not an address; write host:port, as in 127.0.0.1:31313")
    return host.strip("[]") or "0.0.0.0", int(port)


@dataclass(frozen=True)
class GatewaySection:
    """[gateway]"""

    listen: str = "127.0.0.1:31313"
    metrics_listen: str = "127.0.0.1:31314"
    max_body_bytes: int = 64 * 2**20
    connect_timeout_s: float = 3.0
    idle_timeout_s: float = (
        300.0  # silence of a neuron within a stream; there is no limit on its whole length
    )
    response_timeout_s: float = 3600.0  # for an answer that is not streamed
    load_timeout_s: float = 1800.0
    placement_wait_s: float = 60.0  # how long a request waits for busy models to make room for its own
    poll_interval_s: float = 3.0
    shutdown_grace_s: float = 10.0

    def __post_init__(self) -> None:
        split_address(self.listen)
        split_address(self.metrics_listen)
        for name, value in vars(self).items():
            if isinstance(value, int | float) and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")


@dataclass(frozen=True)
class EvictionSection:
    """[eviction]: which model leaves its node, and when."""

    strategy: Literal["priority", "lru"] = "priority"
    turn_s: float = (
        30.0  # how long a model may keep its place, when asked for, while another one waits for it
    )
    idle_ttl_s: float = (
        0.0  # models of the catalogue are unloaded after that long without a request; 0: never
    )
    defrag_after_cycles: int = 50  # unloads on a node after which its memory is looked at; 0: never
    defrag_min_mb: int = 512  # MiB beyond those of its models that make an idle neuron load them anew

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")


@dataclass(frozen=True)
class AuthSection:
    """[auth]: who is served; without a key nobody but users of this machine, unless `anonymous` says else."""

    keys: tuple[str, ...] = field(default=(), metadata={"secret": True})
    admin_keys: tuple[str, ...] = field(default=(), metadata={"secret": True})  # may load and unload models
    keys_file: str | None = None  # of `helexa keys`, relative to the file that names it
    anonymous: bool | None = None  # whether those without a key are served; on loopback only
    neuron_secret: str | None = field(default=None, metadata={"secret": True})  # of neurons that name none

    def __post_init__(self) -> None:
        for name, keys in (("keys", self.keys), ("admin_keys", self.admin_keys)):
            if any(len(key) < 8 for key in keys):
                raise ValueError(f"a key in auth.{name} has fewer than 8 characters")
        if twice := len(self.keys + self.admin_keys) - len({*self.keys, *self.admin_keys}):
            raise ValueError(f"auth.keys and auth.admin_keys have {twice} of their keys twice")
        check_secret("auth.neuron_secret", self.neuron_secret)


@dataclass(frozen=True)
class CorsSection:
    """[cors]: the sites whose pages may use the API in a browser; none, unless named."""

    allow_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for origin in self.allow_origins:
            parts = urlsplit(origin)
            if origin not in ("*", "null") and (
                not parts.hostname or f"{parts.scheme}://{parts.netloc}" != origin
            ):
                raise ValueError(f"cors.allow_origins: {origin!r} must look like https://host:port, or be *")


@dataclass(frozen=True)
class NeuronEntry:
    """[[neurons]]"""

    name: str
    endpoint: str
    kind: Literal["neuron", "openai"] = "neuron"  # openai: another server with that API, whose models stay
    key: str | None = field(default=None, metadata={"secret": True})  # for kind openai
    models: tuple[str, ...] = ()  # of kind openai: those to use; all that its /v1/models tells if empty
    secret: str | None = field(default=None, metadata={"secret": True})  # [auth] neuron_secret if not given
    tls_ca: str | None = None  # PEM file; for https: only whom it has signed is believed
    tls_cert: str | None = None  # PEM files that show the neuron who we are
    tls_key: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.endpoint)
        check_secret(f"neuron {self.name!r}: secret", self.secret)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError(f"neuron {self.name!r}: tls_cert and tls_key belong together")
        if (self.tls_ca or self.tls_cert) and parts.scheme != "https":
            raise ValueError(f"neuron {self.name!r} has tls files, but its endpoint is not https")
        may_have_path = self.kind == "openai" and not parts.query and not parts.fragment
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or (parts.path not in ("", "/") and not may_have_path)
        ):
            raise ValueError(
                f"endpoint {self.endpoint!r} of neuron {self.name!r} must look like http://host:13131"
            )
        if self.kind == "neuron" and (self.key or self.models):
            raise ValueError(f'neuron {self.name!r}: key and models are for kind = "openai" alone')
        if self.kind == "openai" and self.secret:
            raise ValueError(f"neuron {self.name!r}: a server of kind openai has a key, not a secret")
        if self.key is not None and re.fullmatch(r"[\x21-\x7e]+", self.key) is None:
            raise ValueError(f"neuron {self.name!r}: key must be printable ASCII characters without blanks")


@dataclass(frozen=True)
class StoreSection:
    """[store]: where the responses are kept that clients want to continue or look at again."""

    path: str | None = None  # of a file, relative to the one that names it; without one, in memory
    max_bytes: int = 64 * 2**20
    ttl_s: float = 7 * 86400.0  # since the response, or an answer to it, was last used

    def __post_init__(self) -> None:
        for name in ("max_bytes", "ttl_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class AnthropicSection:
    """[anthropic]"""

    normalize_billing_line: bool = True  # hold constant what changes in the line before Claude Code's prompt


@dataclass(frozen=True)
class GatewayConfig:
    """The whole file."""

    models_config: str | None = None  # relative to the file that names it; models.toml beside it if not named
    gateway: GatewaySection = GatewaySection()
    eviction: EvictionSection = EvictionSection()
    auth: AuthSection = AuthSection()
    cors: CorsSection = CorsSection()
    tls: TlsConfig = field(default_factory=TlsConfig)
    store: StoreSection = StoreSection()
    anthropic: AnthropicSection = AnthropicSection()
    log: LogConfig = field(default_factory=LogConfig)
    neurons: tuple[NeuronEntry, ...] = (NeuronEntry("local", "http://127.0.0.1:13131"),)

    def __post_init__(self) -> None:
        names = [neuron.name for neuron in self.neurons]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two neurons are named {twice!r}")


def load_config(
    path: Path | None, overrides: dict[str, object] | None = None
) -> tuple[GatewayConfig, Catalogue]:
    """The effective configuration and the catalogue that it names. Raises ConfigError."""
    config = load_settings(GatewayConfig, path, overrides=overrides)
    folder = path.parent if path else Path()
    keys_file = folder / Path(config.auth.keys_file).expanduser() if config.auth.keys_file else None
    if keys_file is None:
        keys_file = (folder if path else user_folder()) / KEYS_FILE
    config = replace(config, auth=replace(config.auth, keys_file=str(keys_file)))
    if config.store.path:
        kept = folder / Path(config.store.path).expanduser()
        config = replace(config, store=replace(config.store, path=str(kept)))
    if config.models_config is not None:
        named = folder / Path(config.models_config).expanduser()
        if not named.is_file():
            raise ConfigError(f"{path or 'configuration'}: models_config: no file at {named}")
        return config, load_catalogue(named)
    beside = folder / "models.toml"
    return config, load_catalogue(beside) if path and beside.is_file() else Catalogue()
