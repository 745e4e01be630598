"""What clients want kept: responses with their input, bounded and expiring, in memory or in a file of SQLite.

`put` returns at once, and what it was given can be read from then on; a thread of its own writes. What cannot
be written, on a full disk say, stays in memory within bounds. Clients see only what is theirs.
"""

import asyncio
import logging
import os
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar

from helexa.errors import ConfigError, Unavailable
from helexa.gateway.config import StoreSection
from helexa.log import fields

logger = logging.getLogger(__name__)

T = TypeVar("T")
MAX_UNWRITTEN_BYTES = 32 << 20
_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, principal TEXT NOT NULL, previous_id TEXT, used_at REAL NOT NULL,
    bytes INTEGER NOT NULL, body BLOB NOT NULL, items BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS responses_by_use ON responses (used_at);
"""


@dataclass(frozen=True)
class StoredResponse:
    """A response as JSON, with the input items of its own request, a JSON list."""

    id: str
    principal: str
    previous_id: str | None
    body: bytes
    items: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.body) + len(self.items) + 256  # about what a row needs beside them


class ResponseStore:
    """Conversations are kept while they are used: an answer to a response renews all that led to it."""

    def __init__(self, config: StoreSection, clock: Callable[[], float] = time.time):
        """Without a path nothing outlives the process. Raises ConfigError for a file that is no store."""
        path = Path(config.path) if config.path else None
        self._max_bytes = config.max_bytes
        self._ttl_s = config.ttl_s
        self._clock = clock
        self._unwritten: OrderedDict[str, StoredResponse] = OrderedDict()
        self._num_unwritten_bytes = 0
        self._lock = Lock()  # of the unwritten
        self._thread = ThreadPoolExecutor(1, "response-store")
        try:
            self._rows = self._thread.submit(_open, path).result()
            self._num_bytes = self._thread.submit(self._count).result()
        except (sqlite3.Error, OSError) as error:
            self._thread.shutdown()
            raise ConfigError(f"store.path: {path} cannot be used: {error}") from error

    def put(self, stored: StoredResponse) -> None:
        """Keeps it; what is larger than the store is not kept, which the log tells."""
        if stored.num_bytes > self._max_bytes:
            logger.warning("response_too_large", extra=fields(response=stored.id, bytes=stored.num_bytes))
            return
        with self._lock:
            self._unwritten[stored.id] = stored
            self._num_unwritten_bytes += stored.num_bytes
            while self._num_unwritten_bytes > MAX_UNWRITTEN_BYTES and len(self._unwritten) > 1:
                lost = self._unwritten.popitem(last=False)[1]
                self._num_unwritten_bytes -= lost.num_bytes
                logger.warning("response_lost", extra=fields(response=lost.id))
        self._thread.submit(self._write)

    async def get(self, response_id: str, principal: str) -> StoredResponse | None:
        """The response if it is there and theirs."""
        return await self._run(self._read, response_id, principal)

    async def conversation(self, response_id: str, principal: str) -> list[StoredResponse]:
        """The response and all that it continues, oldest first; cut short where one is gone."""
        return await self._run(self._chain, response_id, principal)

    async def delete(self, response_id: str, principal: str) -> bool:
        """Whether it was there and theirs; it is gone then."""
        return await self._run(self._remove, response_id, principal)

    async def close(self) -> None:
        """Writes what is left."""

        def end() -> None:
            self._write()
            self._rows.close()

        with suppress(sqlite3.Error):
            await asyncio.get_running_loop().run_in_executor(self._thread, end)
        self._thread.shutdown()

    async def _run(self, work: Callable[..., T], *arguments: str) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)
        except sqlite3.Error as error:
            raise Unavailable(f"the store of responses cannot be read: {error}") from error

    # What follows runs on the store's thread.

    def _write(self) -> None:
        """Writes all that waits, and makes room; what fails waits for the next time."""
        with self._lock:
            waiting = list(self._unwritten.values())
        now = self._clock()
        try:
            with self._rows:
                for stored in waiting:
                    self._insert(stored, now)
                self._make_room(now)
        except sqlite3.Error as error:
            logger.warning("store_failed", extra=fields(error=str(error), unwritten=len(waiting)))
            with suppress(sqlite3.Error):
                self._num_bytes = self._count()
            return
        for stored in waiting:
            self._forget_unwritten(stored.id)

    def _insert(self, stored: StoredResponse, now: float) -> None:
        row = (*vars(stored).values(), now, stored.num_bytes)
        columns = "id, principal, previous_id, body, items, used_at, bytes"
        self._rows.execute(f"INSERT OR REPLACE INTO responses ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        self._num_bytes += stored.num_bytes

    def _make_room(self, now: float) -> None:
        gone = self._rows.execute(
            "DELETE FROM responses WHERE used_at < ? RETURNING bytes", (now - self._ttl_s,)
        )
        self._num_bytes -= sum(size for (size,) in gone.fetchall())
        while self._num_bytes > self._max_bytes:
            oldest = "SELECT id FROM responses ORDER BY used_at, rowid LIMIT 1"
            gone = self._rows.execute(f"DELETE FROM responses WHERE id IN ({oldest}) RETURNING bytes")
            found = gone.fetchone()
            if found is None:
                self._num_bytes = 0
                return
            self._num_bytes -= found[0]

    def _read(self, response_id: str, principal: str) -> StoredResponse | None:
        with self._lock:
            found = self._unwritten.get(response_id)
        if found is None:
            columns = "id, principal, previous_id, body, items"
            row = self._rows.execute(
                f"SELECT {columns} FROM responses WHERE id = ? AND used_at >= ?",
                (response_id, self._clock() - self._ttl_s),
            ).fetchone()
            found = StoredResponse(*row) if row else None
        return found if found is not None and found.principal == principal else None

    def _chain(self, response_id: str, principal: str) -> list[StoredResponse]:
        chain: list[StoredResponse] = []
        wanted: str | None = response_id
        while wanted is not None and (found := self._read(wanted, principal)) is not None:
            chain.insert(0, found)
            wanted = found.previous_id
        now = self._clock()
        with suppress(sqlite3.Error), self._rows:
            self._rows.executemany(
                "UPDATE responses SET used_at = ? WHERE id = ?", [(now, stored.id) for stored in chain]
            )
        return chain

    def _remove(self, response_id: str, principal: str) -> bool:
        if self._read(response_id, principal) is None:
            return False
        with self._rows:
            self._rows.execute("DELETE FROM responses WHERE id = ?", (response_id,))
        self._forget_unwritten(response_id)
        self._num_bytes = self._count()
        return True

    def _forget_unwritten(self, response_id: str) -> None:
        with self._lock:
            if (found := self._unwritten.pop(response_id, None)) is not None:
                self._num_unwritten_bytes -= found.num_bytes

    def _count(self) -> int:
        (size,) = self._rows.execute("SELECT coalesce(sum(bytes), 0) FROM responses").fetchone()
        return int(size)


def _open(path: Path | None) -> sqlite3.Connection:
    """The rows, for the calling thread alone; a new file is its owner's only."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    rows = sqlite3.connect(path or ":memory:", timeout=5.0)
    try:
        rows.execute("PRAGMA journal_mode = WAL")
        rows.execute("PRAGMA synchronous = NORMAL")
        rows.execute("PRAGMA journal_size_limit = 16777216")
        rows.execute("PRAGMA secure_delete = ON")
        rows.executescript(_SCHEMA)
    except sqlite3.Error:
        rows.close()
        raise
    return rows
