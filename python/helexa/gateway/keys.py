"""The keys file: API keys at rest, one JSON object per line, each with the digest of its key and no key.

It is replaced as a whole and never written in place, so that a reader sees the old keys or the new ones.
"""

import fcntl
import hashlib
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from helexa.errors import BadRequest, ConfigError

MADE_KEY = re.compile(r"sk-helexa-[\w-]{43}", re.ASCII)
MAX_PRIORITY = 100
_AMOUNT = re.compile(r"(\d{1,12})([kKmM]?)/(\d{1,6})?([smhd])", re.ASCII)
_TIMES = {"": 1, "k": 1000, "m": 10**6}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]


class Limit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """At most `amount` requests or tokens in any `window_s` seconds."""

    unit: Literal["requests", "tokens"]
    amount: Annotated[int, Meta(ge=1)]
    window_s: Annotated[int, Meta(ge=1)]

    def __str__(self) -> str:
        letter = next(letter for letter in "dhms" if self.window_s % _SECONDS[letter] == 0)
        count = self.window_s // _SECONDS[letter]
        return f"{self.amount} {self.unit} per {'' if count == 1 else f'{count} '}{_WORDS[letter]}" + (
            "" if count == 1 else "s"
        )


_WORDS = {"s": "second", "m": "minute", "h": "hour", "d": "day"}


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line. What a version does not know could be a restriction, so unknown fields are errors."""

    id: Annotated[str, Meta(pattern=r"^[0-9a-f]{12}$")]
    name: Name
    digest: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]  # SHA-256 of the key
    created_at: int  # Unix time
    models: tuple[str, ...] = ()
    limits: tuple[Limit, ...] = ()
    priority: Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    admin: bool = False


def digest(key: str) -> bytes:
    """The SHA-256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def parse_limit(unit: Literal["requests", "tokens"], text: str) -> Limit:
    """The limit that `60/m`, `2M/d` or `1000/12h` stands for. Raises BadRequest."""
    found = _AMOUNT.fullmatch(text.strip())
    if found is None or not int(found[1]) or found[3] == "0":
        raise BadRequest(f"{text!r} is no limit; write amount/time, as in 60/m, 2M/d or 1000/12h")
    amount = int(found[1]) * _TIMES[found[2].lower()]
    return Limit(unit, amount, int(found[3] or 1) * _SECONDS[found[4]])


def read_keys(path: Path) -> tuple[KeyRecord, ...]:
    """The keys in the file, none if there is no file. Raises ConfigError that names the line."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if mode & 0o022:
        raise ConfigError(f"{path}: others may write this file and so make keys; chmod 600 it")
    if data and not data.endswith(b"\n"):
        raise ConfigError(f"{path}: the last line has no end; the file was not written completely")
    records = tuple(_parse(path, number, line) for number, line in enumerate(data.splitlines(), 1) if line)
    for member in ("id", "name", "digest"):
        values = [getattr(record, member) for record in records]
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise ConfigError(f"{path}: two keys have the {member} {twice!r}")
    return records


def add_key(
    path: Path,
    name: str,
    *,
    models: Sequence[str] = (),
    limits: Sequence[Limit] = (),
    priority: int = 0,
    admin: bool = False,
) -> tuple[str, KeyRecord]:
    """A new key, which is nowhere else, and its record, which is in the file. Raises BadRequest."""
    key = f"sk-helexa-{secrets.token_urlsafe(32)}"
    record = KeyRecord(
        id=secrets.token_hex(6),
        name=name,
        digest=digest(key).hex(),
        created_at=int(time.time()),
        models=tuple(models),
        limits=tuple(limits),
        priority=priority,
        admin=admin,
    )
    try:
        msgspec.convert(msgspec.to_builtins(record), KeyRecord)
    except msgspec.ValidationError:
        message = f"{name!r} is no name; use up to 64 letters, digits, dots, dashes and at signs"
        raise BadRequest(message) from None

    def added(records: tuple[KeyRecord, ...]) -> tuple[KeyRecord, ...]:
        if any(known.name == name for known in records):
            raise BadRequest(f"there is a key named {name!r} already; revoke it first or choose another name")
        return (*records, record)

    _change(path, added)
    return key, record


def revoke_key(path: Path, name: str) -> KeyRecord:
    """Removes the key of that name or id and returns its record. Raises BadRequest."""
    found: list[KeyRecord] = []

    def rest(records: tuple[KeyRecord, ...]) -> tuple[KeyRecord, ...]:
        found.extend(record for record in records if name in (record.name, record.id))
        if not found:
            raise BadRequest(f"there is no key {name!r} in {path}; `helexa keys list` lists them")
        return tuple(record for record in records if record not in found)

    _change(path, rest)
    return found[0]


def _parse(path: Path, number: int, line: bytes) -> KeyRecord:
    try:
        return msgspec.json.decode(line, type=KeyRecord)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: line {number} is no key: {error}") from None


def _change(path: Path, change: Callable[[tuple[KeyRecord, ...]], tuple[KeyRecord, ...]]) -> None:
    """Replaces the file by what `change` makes of its keys; others who do the same wait."""
    try:
        with _locked(path):
            data = b"".join(msgspec.json.encode(record) + b"\n" for record in change(read_keys(path)))
            _replace(path, data)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock of the folder, which needs no file of its own."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _replace(path: Path, data: bytes) -> None:
    """Puts `data` in place of the file, in one step that a crash cannot split; mode 0600, owner as before."""
    target = path.resolve()  # a link stays a link
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            if os.geteuid() == 0:
                owner = (target if target.exists() else target.parent).stat()
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
