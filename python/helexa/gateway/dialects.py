"""Which API a path belongs to: how its requests become calls of a neuron, and how its failures look.

The neuron speaks one wire, OpenAI's. Its own routes pass through unchanged; every other dialect is a module
of `wire` that writes a canonical body and translates the answer back, and an entry of `app.all_dialects`.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import msgspec
from starlette.routing import BaseRoute

from helexa.errors import HelexaError
from helexa.wire.body import decode
from helexa.wire.dialect import Translator
from helexa.wire.errors import error_bytes, error_headers

CHAT_PATH = "/v1/chat/completions"
PASSED_PATHS = (CHAT_PATH, "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize")


# Another body to ask with, after a refusal, if the neuron found that one too long; or None.
Shorten = Callable[[bytes, HelexaError], bytes | None]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it came, its key already checked."""

    body: bytes
    headers: Mapping[str, str]  # by name in lower case
    principal: str = ""  # whose request it is; what a dialect keeps is kept apart by it


@dataclass(frozen=True, slots=True)
class Job:
    """What a neuron is asked for. `model` is the client's word; the gateway puts the id into the body."""

    path: str
    model: str
    body: bytes
    stream: bool = False
    translator: Translator | None = None
    told_in_stream: frozenset[str] = frozenset()  # codes of errors that are events, even as a stream's first
    shorten: Shorten | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that tells of an error."""

    status: int
    headers: Mapping[str, str]
    body: bytes


Prepare = Callable[[Asked], Awaitable[Job]]
Refuse = Callable[[HelexaError, str], Refusal]


def refuse(error: HelexaError, request_id: str) -> Refusal:
    """The error in OpenAI's envelope."""
    headers = {"content-type": "application/json", "x-request-id": request_id, **error_headers(error)}
    return Refusal(error.status, headers, error_bytes(error))


@dataclass(frozen=True)
class Dialect:
    """One API.

    generating: what POST to a path means to a neuron; `prepare` raises HelexaError for a wrong request.
    routes: what it answers without a neuron. Every failure below `prefixes` is told by `refuse`.
    id_header: what its clients call x-request-id, beside that name itself.
    """

    name: str
    prefixes: tuple[str, ...]
    generating: Mapping[str, Prepare]
    routes: tuple[BaseRoute, ...] = ()
    refuse: Refuse = refuse
    id_header: str | None = None


class _Head(msgspec.Struct):
    """All that the gateway itself reads of a request that passes through; the neuron judges the rest."""

    model: str
    stream: bool | None = None


def _passed(path: str) -> Prepare:
    async def prepare(asked: Asked) -> Job:
        head = decode(asked.body, _Head)
        return Job(path, head.model, asked.body, head.stream is True)

    return prepare


def openai() -> Dialect:
    """What the neuron speaks itself."""
    return Dialect("openai", ("",), {path: _passed(path) for path in PASSED_PATHS})


@dataclass(frozen=True)
class Dialects:
    """The table: by path, the dialect whose envelope its clients expect."""

    entries: tuple[Dialect, ...]
    _by_prefix: list[tuple[str, Dialect]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pairs = [(prefix, dialect) for dialect in self.entries for prefix in dialect.prefixes]
        pairs.sort(key=lambda pair: -len(pair[0]))
        object.__setattr__(self, "_by_prefix", pairs)

    def of(self, path: str) -> Dialect:
        """The dialect with the longest prefix of `path`; a prefix ends where a segment does."""
        for prefix, dialect in self._by_prefix:
            if not prefix or path == prefix or path.startswith(prefix + "/"):
                return dialect
        raise LookupError(f"no dialect answers for {path}")
