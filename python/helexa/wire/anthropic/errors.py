"""Errors in Anthropic's envelope."""

from typing import Any

from helexa.errors import BadRequest, HelexaError, Overloaded

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def error_status(error: HelexaError) -> int:
    """The HTTP status; a prompt that is too long is always a 400, as agents expect it."""
    return 400 if _is_overflow(error) else error.status


def error_body(error: HelexaError, request_id: str | None = None) -> dict[str, Any]:
    """`{"type": "error", "error": {type, message}}`, with the request id where there is one.

    Too long a prompt is worded as Anthropic words it, since agents read the numbers and compact.
    """
    status = error_status(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    if status == 503 and error.code == Overloaded.code:
        kind = "overloaded_error"
    body: dict[str, Any] = {"type": "error", "error": {"type": kind, "message": _message(error)}}
    if "details" in error.extra:
        body["error"]["details"] = error.extra["details"]
    return body | {"request_id": request_id} if request_id else body


def _message(error: HelexaError) -> str:
    """What happened. A neuron counts messages by those that it was sent, so its numbers say nothing here."""
    if _is_overflow(error):
        return f"prompt is too long: {error.extra['prompt_tokens']} tokens > {error.extra['max']} maximum"
    is_of_neuron = not isinstance(error, BadRequest)
    if is_of_neuron and error.param and error.param.startswith("messages["):
        message = error.message.replace(f"'{error.param}'", error.param)
        return message.replace(error.param, "a block of 'messages'")
    return error.message


def _is_overflow(error: HelexaError) -> bool:
    return error.extra.keys() >= {"max", "prompt_tokens"}
