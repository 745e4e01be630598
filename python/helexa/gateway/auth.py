"""Who asks, and what they may: API keys, and those who need none.

Keys are known by their SHA-256 alone, which is enough for random keys of 256 bits. A key is looked up under a
keyed hash of that digest, whose key is drawn anew by each process: how long a comparison takes tells nobody
anything about the keys.
"""

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from helexa.errors import Forbidden, Unauthorized
from helexa.gateway.config import GatewayConfig, split_address
from helexa.gateway.keys import MADE_KEY, KeyRecord, Limit, digest, read_keys
from helexa.serving import is_loopback, is_public_name
from helexa.wire.generation import PRINCIPAL_HEADER, PRIORITY_HEADER


@dataclass(frozen=True)
class Principal:
    """Who asks. Neurons know them by `id`; an empty one is whoever works on this machine."""

    id: str = ""
    name: str = ""  # for people
    models: tuple[str, ...] = ()  # names or patterns of them; all if there are none
    limits: tuple[Limit, ...] = ()
    priority: int = 0
    is_admin: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """What neurons are told."""
        return {PRINCIPAL_HEADER: self.id, PRIORITY_HEADER: str(self.priority)} if self.id else {}

    def may_use(self, *names: str) -> bool:
        """Whether one of the names of a model is allowed."""
        return not self.models or any(fnmatchcase(name, pattern) for name in names for pattern in self.models)

    def require_model(self, *names: str) -> None:
        """Raises Forbidden unless one of the names of a model is allowed."""
        if not self.may_use(*names):
            raise Forbidden(
                f"this API key may not use model {names[0]!r:.200}; GET /v1/models lists those that it may",
                param="model",
            )

    @property
    def sees_fleet(self) -> bool:
        """Whether they may know of all models, and where they are."""
        return self.is_admin or not self.models

    def require_fleet(self) -> None:
        """Raises Forbidden for a key of some models alone."""
        if not self.sees_fleet:
            raise Forbidden("this API key is for some models alone, which GET /v1/models lists")

    def require_admin(self) -> None:
        """Raises Forbidden unless they may load and unload models."""
        if not self.is_admin:
            raise Forbidden("this needs an admin key, as `helexa keys add NAME --admin` makes one")


class Keys:
    """The keys of configuration and keys file. Without one, only users of this machine are served."""

    def __init__(self, config: GatewayConfig):
        self._secret = secrets.token_bytes(32)
        self.configure(config)

    def configure(self, config: GatewayConfig) -> None:
        """Takes over the configuration and reads its keys file. Raises ConfigError and changes nothing."""
        file = Path(config.auth.keys_file) if config.auth.keys_file else None
        self._stamp = _stamp(file)  # before it is read
        records = read_keys(file) if file else ()
        given = [(key, f"config-{_mark(key)}", False) for key in config.auth.keys]
        given += [(key, f"admin-{_mark(key)}", True) for key in config.auth.admin_keys]
        known = {
            self._place_of(digest(key)): (digest(key), Principal(name, name, is_admin=is_admin))
            for key, name, is_admin in given
        }
        for record in records:
            own = bytes.fromhex(record.digest)
            known[self._place_of(own)] = own, _principal(record)
        self._file, self._config, self._known = file, config, known
        self._anonymous = self._without_key(config, any(entry.is_admin for _, entry in known.values()))
        self._is_local = config.auth.anonymous is None

    def refresh(self) -> bool:
        """Whether the keys file had changed and was read. Raises ConfigError once for each bad one."""
        if _stamp(self._file) == self._stamp:
            return False
        self.configure(self._config)
        return True

    @property
    def principals(self) -> list[Principal]:
        return [principal for _, principal in self._known.values()]

    def check(self, headers: Mapping[str, str]) -> Principal:
        """Who sent these headers, with a key as `Authorization: Bearer KEY` or `x-api-key: KEY`.

        Raises Unauthorized for a revoked key, and for none or any other where a key is required.
        """
        offered = list(_offered(headers))
        for key in offered:
            own = digest(key)
            found, principal = self._known.get(self._place_of(own), (b"", None))
            if principal is not None and hmac.compare_digest(found, own):
                return principal
        if any(MADE_KEY.fullmatch(key) for key in offered):
            raise Unauthorized("the API key is not known here; it may have been revoked")
        if self._anonymous and not (self._is_local and is_public_name(headers.get("host", ""))):
            return self._anonymous
        if not offered:
            raise Unauthorized("an API key is required: send Authorization: Bearer KEY or x-api-key: KEY")
        raise Unauthorized("the API key is not known here")

    def name_of(self, headers: Mapping[str, str]) -> str:
        """The name of whoever sent these headers; empty for who has none, or is not served."""
        try:
            return self.check(headers).name
        except Unauthorized:
            return ""

    def sees_fleet(self, headers: Mapping[str, str]) -> bool:
        """Whether whoever sent these headers would be served and may know of the whole fleet."""
        try:
            return self.check(headers).sees_fleet
        except Unauthorized:
            return False

    def _place_of(self, own: bytes) -> bytes:
        return hashlib.blake2b(own, key=self._secret, digest_size=16).digest()

    @staticmethod
    def _without_key(config: GatewayConfig, has_admin: bool) -> Principal | None:
        """Who is served without a key: everybody or nobody as configured, else users of this machine."""
        if config.auth.anonymous is not None:
            return Principal("anonymous", "anonymous") if config.auth.anonymous else None
        host, _ = split_address(config.gateway.listen)
        return Principal(is_admin=not has_admin) if is_loopback(host) else None


@cache
def _mark(key: str) -> str:
    """What names a key that has no name, the same in every process and wherever it stands in its list.

    It is seen in logs and metrics, so it takes work to find a weak key by it.
    """
    data = key.encode("utf-8", "surrogateescape")
    return hashlib.scrypt(data, salt=b"helexa: names of keys", n=2**13, r=8, p=1, dklen=5).hex()


def _stamp(file: Path | None) -> tuple[int, ...] | None:
    """What tells one state of the file from another; None if there is none."""
    try:
        found = file.stat() if file else None
    except OSError:
        return None
    return found and (found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode)


def _principal(record: KeyRecord) -> Principal:
    return Principal(
        record.id, record.name, record.models, record.limits, record.priority, is_admin=record.admin
    )


def _offered(headers: Mapping[str, str]) -> Iterable[str]:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        yield token.strip()
    if key := headers.get("x-api-key", "").strip():
        yield key
