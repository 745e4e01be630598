"""Server-sent events (WHATWG HTML, section 9.2): encoding, and a parser that takes bytes as they come."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_PREFILL = re.compile(rb": prefill (\d+)/(\d+)")


class Prefill(NamedTuple):
    """How many tokens of a prompt are computed: a neuron's sign of life before the first one of an answer."""

    done: int
    total: int

    @classmethod
    def parse(cls, line: bytes) -> "Prefill | None":
        """What a line of a stream tells; None for any other line."""
        found = _PREFILL.fullmatch(line)
        return cls(int(found[1]), int(found[2])) if found else None

    def encode(self) -> bytes:
        """The comment."""
        return comment(f"prefill {self.done}/{self.total}")


class Event(NamedTuple):
    """One dispatched event; `data` has the lines joined by newlines."""

    data: str
    name: str = "message"
    id: str | None = None


def encode(payload: Any, name: str | None = None) -> bytes:
    """One event whose data is `payload` as JSON (which has no line break)."""
    head = b"event: " + name.encode() + b"\n" if name else b""
    return head + b"data: " + orjson.dumps(payload) + b"\n\n"


def encode_raw(json: bytes) -> bytes:
    """One event whose data is JSON already written on one line."""
    return b"data: " + json + b"\n\n"


def comment(text: str) -> bytes:
    """A line that clients ignore; it shows proxies and time-outs that the stream is alive."""
    return "".join(f": {line}\n" for line in text.splitlines() or [""]).encode() + b"\n"


class Parser:
    """Incremental: `feed` takes any split of the byte stream and yields the events that became complete.

    Lines may end in LF, CRLF or CR. What is not terminated by an empty line when the stream ends is no event.
    Raises ValueError when one event grows over `max_bytes`.
    """

    def __init__(self, max_bytes: int = 16 << 20):
        self._max_bytes = max_bytes
        self._tail = b""
        self._size = 0
        self._data: list[str] = []
        self._name = ""
        self._id: str | None = None
        self._at_start = True

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Yields the events completed by `chunk`, in order."""
        buffer = self._tail + chunk
        if self._at_start and len(buffer) < 3 and b"\xef\xbb\xbf".startswith(buffer):
            self._tail = buffer
            return
        if self._at_start:
            self._at_start = False
            buffer = buffer.removeprefix(b"\xef\xbb\xbf")
        held_back = buffer.endswith(b"\r")  # the next chunk may begin with the LF of a CRLF
        lines = (
            (buffer[:-1] if held_back else buffer).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        )
        self._tail = lines.pop() + (b"\r" if held_back else b"")
        if self._size + len(self._tail) > self._max_bytes:
            raise ValueError(f"an event of the stream is larger than {self._max_bytes} bytes")
        for line in lines:
            if event := self._take(line):
                yield event

    def _take(self, line: bytes) -> Event | None:
        if not line:
            event = Event("\n".join(self._data), self._name or "message", self._id) if self._data else None
            self._data, self._name, self._size = [], "", 0
            return event
        self._size += len(line)
        if self._size > self._max_bytes:
            raise ValueError(f"an event of the stream is larger than {self._max_bytes} bytes")
        field, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._name = value
        elif field == "id" and "\0" not in value:
            self._id = value
        return None
