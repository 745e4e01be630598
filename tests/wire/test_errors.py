"""The error envelope, out and back."""

import orjson
import pytest

from helexa.errors import ContextTooLong, HelexaError, Overloaded, Unauthorized
from helexa.wire.errors import error_body, error_bytes, error_headers, internal_error, parse_error


def test_the_envelope_has_the_four_members_and_what_else_the_error_knows():
    error = ContextTooLong("too long", param="messages", max=10, prompt_tokens=12)
    assert error_body(error) == {
        "error": {
            "message": "too long",
            "type": "invalid_request_error",
            "code": "context_length_exceeded",
            "param": "messages",
            "max": 10,
            "prompt_tokens": 12,
        }
    }


@pytest.mark.parametrize(("seconds", "header"), [(0.1, "1"), (2.1, "3"), (60, "60")])
def test_retry_after_is_in_whole_seconds(seconds, header):
    assert error_headers(Overloaded("full", retry_after_s=seconds)) == {"retry-after": header}
    assert error_headers(HelexaError("x")) == {}
    assert error_headers(Unauthorized("x")) == {"www-authenticate": "Bearer"}


def test_what_was_sent_is_understood_again():
    error = Overloaded("full", retry_after_s=3, progress={"percent": 5})
    parsed = parse_error(503, error_bytes(error), error_headers(error)["retry-after"])
    assert error_body(parsed) == error_body(error)
    assert (parsed.status, parsed.retry_after_s) == (503, 3.0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>Bad gateway</html>", "<html>Bad gateway</html>"),
        (b"", "upstream answered 502 without a body"),
        (b'{"error": "just text"}', "just text"),
        (b'{"error": 5}', '{"error": 5}'),
        (b"[]", "[]"),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
def test_any_body_makes_an_error(body, message):
    error = parse_error(502, body, "soon")
    assert error.message == message
    assert error.code == "upstream_error"
    assert error.retry_after_s is None


def test_a_numeric_code_of_another_server_is_kept():
    assert parse_error(400, b'{"error": {"message": "m", "code": 400}}').code == "400"


def test_internal_errors_tell_nothing():
    assert orjson.loads(error_bytes(internal_error()))["error"]["code"] == "internal_error"
