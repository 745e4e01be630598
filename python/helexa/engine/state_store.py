"""Parts of caches as bytes under names, in main memory and in files. They outlive models and the process.

What is put here is written to a file at once, if there is a folder, and kept in memory as far as there is
room. Files appear as a whole, private to their owner, and carry a version and a checksum: one that is damaged
is removed and counts as absent. Beyond the budget, what was not used for longest goes. For any thread.
"""

import hashlib
import logging
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from helexa.log import fields

logger = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview

_SUFFIX = ".state"
_VERSION = 1
_HEADER = struct.Struct("<8sIQ32s")  # magic, version, bytes that follow, their SHA-256
_MAGIC = b"helexast"


@dataclass(frozen=True, slots=True)
class Stored:
    """An entry with the tokens from `start` to `end` of a prompt: a full page, or where something ended."""

    name: str
    start: int
    end: int
    is_tail: bool


@dataclass(slots=True)
class _Entry:
    nbytes: int
    data: bytearray | None  # in memory
    is_on_disk: bool


class StateStore:
    """Entries by name: hexadecimal digits, or what `tail_name` makes of them."""

    def __init__(self, *, host_bytes: int = 0, path: Path | None = None, max_bytes: int = 0):
        """Finds what is in the folder `path`, which is made if need be. Raises OSError."""
        self.host_bytes, self.max_bytes = host_bytes, max_bytes
        self._folder = path
        self._lock = threading.RLock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the least recently used first
        self._lengths: dict[str, dict[int, int]] = {}  # of tails by their parent, and how many there are
        self._held_bytes = self._disk_bytes = 0
        self.num_damaged = 0  # entries that could not be read again
        if path is not None:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._scan(path)

    @property
    def held_bytes(self) -> int:
        """In main memory."""
        return self._held_bytes

    @property
    def disk_bytes(self) -> int:
        """In files."""
        return self._disk_bytes

    @property
    def num_entries(self) -> int:
        """In either."""
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def lengths(self, parent: str) -> list[int]:
        """How many tokens those tails have that follow the entry `parent`."""
        with self._lock:
            return list(self._lengths.get(parent, ()))

    def put(self, name: str, parts: Sequence[Buffer]) -> bool:
        """Keeps the parts, one after the other, under that name; False if there is no room for them."""
        views = [memoryview(part).cast("B") for part in parts]
        nbytes = sum(len(view) for view in views)
        fits_host, fits_disk = nbytes <= self.host_bytes, nbytes + _HEADER.size <= self.max_bytes
        is_on_disk = self._folder is not None and fits_disk and self._write(name, views, nbytes)
        if not is_on_disk and not fits_host:
            return False
        data = bytearray().join(views) if fits_host else None
        with self._lock:
            self._forget(name)
            self._add(name, _Entry(nbytes, data, is_on_disk))
            self._shrink()
        return True

    def get(self, name: str) -> bytearray | None:
        """The bytes under the name; None if they are gone or damaged."""
        with self._lock:
            entry = self._entries.get(name)
            data = None if entry is None else entry.data
        if data is not None or entry is None:
            return data
        try:
            return self._read(name)
        except (OSError, ValueError) as error:
            logger.warning("state_ignored", extra=fields(file=name + _SUFFIX, error=error))
            self.num_damaged += 1
            self.remove(name)
            return None

    def touch(self, names: Iterable[str]) -> None:
        """They are used, the last of them latest."""
        with self._lock:
            for name in names:
                entry = self._entries.get(name)
                if entry is None:
                    continue
                self._entries.move_to_end(name)
                if entry.is_on_disk:
                    try:
                        os.utime(self._path(name))
                    except OSError:
                        self._forget(name)

    def remove(self, name: str) -> None:
        """Forgets the entry and removes its file."""
        with self._lock:
            entry = self._forget(name)
        if entry is not None and entry.is_on_disk:
            self._unlink(name)

    def _scan(self, folder: Path) -> None:
        found = []
        for file in folder.iterdir():
            if file.suffix == _SUFFIX and _is_name(file.stem):
                status = file.stat()
                found.append((status.st_mtime_ns, file.stem, status.st_size - _HEADER.size))
            elif file.suffix == ".partial":  # from a process that was killed
                file.unlink(missing_ok=True)
        for _, name, nbytes in sorted(found):
            self._add(name, _Entry(nbytes, None, True))
        self._shrink()

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / (name + _SUFFIX)

    def _unlink(self, name: str) -> None:
        with suppress(OSError):  # a file that cannot be removed is found again later
            self._path(name).unlink()

    def _write(self, name: str, views: list[memoryview], nbytes: int) -> bool:
        digest = hashlib.sha256()
        for view in views:
            digest.update(view)
        path = self._path(name)
        partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "wb", buffering=0) as file:
                file.write(_HEADER.pack(_MAGIC, _VERSION, nbytes, digest.digest()))
                for view in views:
                    _write_all(file.fileno(), view)
            partial.replace(path)
        except OSError as error:
            logger.warning("state_not_written", extra=fields(file=path, error=error))
            with suppress(OSError):
                partial.unlink()
            return False
        return True

    def _read(self, name: str) -> bytearray:
        """Raises ValueError if the file is not what was written."""
        with self._path(name).open("rb", buffering=0) as file:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                raise ValueError("the header is cut off")
            magic, version, nbytes, digest = _HEADER.unpack(header)
            if magic != _MAGIC or version != _VERSION:
                raise ValueError(f"it is not of version {_VERSION}")
            if os.fstat(file.fileno()).st_size != _HEADER.size + nbytes:
                raise ValueError(f"it does not have the {nbytes} bytes that it should")
            data = bytearray(nbytes)
            view = memoryview(data)
            while view:
                if (count := file.readinto(view)) == 0:
                    raise ValueError("it was cut off")
                view = view[count:]
        if hashlib.sha256(data).digest() != digest:
            raise ValueError("the checksum is wrong")
        return data

    def _add(self, name: str, entry: _Entry) -> None:
        self._entries[name] = entry
        self._held_bytes += 0 if entry.data is None else entry.nbytes
        self._disk_bytes += (entry.nbytes + _HEADER.size) * entry.is_on_disk
        parent, length = _parent_of(name)
        if length:
            lengths = self._lengths.setdefault(parent, {})
            lengths[length] = lengths.get(length, 0) + 1

    def _forget(self, name: str) -> _Entry | None:
        entry = self._entries.pop(name, None)
        if entry is None:
            return None
        self._held_bytes -= 0 if entry.data is None else entry.nbytes
        self._disk_bytes -= (entry.nbytes + _HEADER.size) * entry.is_on_disk
        parent, length = _parent_of(name)
        if length:
            lengths = self._lengths[parent]
            lengths[length] -= 1
            if not lengths[length]:
                del lengths[length]
            if not lengths:
                del self._lengths[parent]
        return entry

    def _shrink(self) -> None:
        """Keeps both tiers within their budgets; what is in none of them is gone."""
        for name, entry in list(self._entries.items()):
            is_over_disk = self._disk_bytes > self.max_bytes
            if not is_over_disk and self._held_bytes <= self.host_bytes:
                return
            if entry.is_on_disk and is_over_disk:
                self._unlink(name)
                entry.is_on_disk = False
                self._disk_bytes -= entry.nbytes + _HEADER.size
            if entry.data is not None and self._held_bytes > self.host_bytes:
                entry.data = None
                self._held_bytes -= entry.nbytes
            if entry.data is None and not entry.is_on_disk:
                self._forget(name)


def tail_name(parent: str, length: int, own: str) -> str:
    """The name of an entry `own`, of so many tokens, that `lengths(parent)` knows."""
    return f"{parent}-{length}-{own}"


def _parent_of(name: str) -> tuple[str, int]:
    parent, _, rest = name.partition("-")
    return parent, int(rest.partition("-")[0] or 0)


def _is_name(name: str) -> bool:
    parts = name.split("-")
    return len(parts) in (1, 3) and (len(parts) == 1 or (parts[1].isdecimal() and parts[1].isascii()))


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]
