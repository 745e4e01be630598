"""The OpenAI error envelope: any `HelexaError` as body and headers, and back again from a neuron's answer."""

import math
from typing import Any

import msgspec
import orjson

from helexa.errors import HelexaError


class ErrorBody(msgspec.Struct, frozen=True):
    """What is inside `{"error": …}`; further members are kept by `parse_error` in the error's `extra`."""

    message: str
    type: str = "api_error"
    code: str | int | None = None
    param: str | None = None


def error_body(error: HelexaError) -> dict[str, Any]:
    """The envelope `{"error": {message, type, code, param, …extra}}`."""
    members = {"message": error.message, "type": error.type, "code": error.code, "param": error.param}
    return {"error": members | error.extra}


def error_bytes(error: HelexaError) -> bytes:
    """The envelope as JSON."""
    return orjson.dumps(error_body(error), default=str)


def error_headers(error: HelexaError) -> dict[str, str]:
    """`Retry-After` in whole seconds, at least 1, if the error says when to come back; how to show a key."""
    if error.status == 401:
        return {"www-authenticate": "Bearer"}
    if error.retry_after_s is None:
        return {}
    return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}


def internal_error() -> HelexaError:
    """What a client is told of a fault of our own; the log has the rest."""
    return HelexaError("internal error; the server's log has the details")


def parse_error(status: int, body: bytes, retry_after: str | None = None) -> HelexaError:
    """The error that another server answered, with its status, code, type and message; any body will do."""
    try:
        members = orjson.loads(body)["error"]
        parsed = msgspec.convert({"message": members} if isinstance(members, str) else members, ErrorBody)
        known = set(ErrorBody.__struct_fields__)
        extra = {k: v for k, v in members.items() if k not in known} if isinstance(members, dict) else {}
    except (orjson.JSONDecodeError, msgspec.ValidationError, KeyError, TypeError, IndexError):
        text = body[:600].decode("utf-8", "replace").strip()
        parsed, extra = ErrorBody(text or f"upstream answered {status} without a body"), {}
    seconds = float(retry_after) if retry_after and retry_after.strip().isdecimal() else None
    error = HelexaError(parsed.message, param=parsed.param, retry_after_s=seconds)
    error.extra = extra
    error.status = status
    error.code = str(parsed.code) if parsed.code is not None else "upstream_error"
    error.type = parsed.type
    return error
