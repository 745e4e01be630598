"""What a server of kind openai is asked and how its answer is read: no extension of ours, and its usage.

It sees neither who asks nor any header that it has no use for; its own headers stay with us, too.
"""

import re
from collections.abc import Mapping

import msgspec
import orjson

from helexa.wire.body import decode

EXTENSIONS = ("thinking_budget",)  # fields of the canonical chat that no other server knows
_REQUEST_HEADERS = (
    *("content-type", "accept-encoding", "x-request-id", "user-agent", "traceparent", "tracestate"),
)
ANSWER_HEADERS = frozenset((b"content-type", b"cache-control", b"retry-after"))
_EVENTS = re.compile(rb"(?<=\n\n)|(?<=\n\r\n)")


def request_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Those of a request that may go to such a server."""
    return {name: headers[name] for name in _REQUEST_HEADERS if name in headers}


def request_body(body: bytes, *, is_stream: bool) -> tuple[bytes, bool]:
    """The body as such a server gets it, and whether it asks for a usage that the client does not want.

    Every value but those of our own is kept byte for byte, half characters apart. Raises MalformedJson.
    """
    members = decode(body, dict[str, msgspec.Raw])
    removed = [members.pop(name, None) for name in EXTENSIONS]
    wants_usage = is_stream and not _includes_usage(members.get("stream_options"))
    if wants_usage:
        members["stream_options"] = msgspec.Raw(b'{"include_usage":true}')
    return (msgspec.json.encode(members) if wants_usage or any(removed) else body), wants_usage


def _includes_usage(options: msgspec.Raw | None) -> bool:
    told = decode(bytes(options), object) if options is not None else None
    return isinstance(told, dict) and told.get("include_usage") is True


def without_usage(events: bytes) -> bytes:
    """Whole events without those that tell nothing but the usage."""
    if b'"usage"' not in events:
        return events
    return b"".join(event for event in _EVENTS.split(events) if not _tells_usage(event))


def _tells_usage(event: bytes) -> bool:
    if not event.startswith(b"data: {"):
        return False
    try:
        chunk = orjson.loads(event[6:])
    except orjson.JSONDecodeError:
        return False
    return bool(chunk.get("usage")) and not chunk.get("choices")
