import json

import pytest

from helexa.errors import (
    BadRequest,
    ContextTooLong,
    Forbidden,
    HelexaError,
    InvalidParameter,
    ModelLoading,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    QuotaExceeded,
    Unauthorized,
    UnknownModel,
    UpstreamClosed,
    UpstreamTimeout,
)
from helexa.wire.anthropic import error_body, error_status
from helexa.wire.errors import parse_error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BadRequest, "invalid_request_error"),
        (Unauthorized, "authentication_error"),
        (Forbidden, "permission_error"),
        (UnknownModel, "not_found_error"),
        (NotFound, "not_found_error"),
        (PayloadTooLarge, "request_too_large"),
        (QuotaExceeded, "rate_limit_error"),
        (Overloaded, "overloaded_error"),
        (ModelLoading, "api_error"),
        (HelexaError, "api_error"),
        (UpstreamClosed, "api_error"),
        (UpstreamTimeout, "timeout_error"),
    ],
)
def test_each_error_has_the_type_that_its_status_has_at_anthropic(error, kind):
    made = error("words")
    assert error_body(made, "req_1") == {
        "type": "error",
        "error": {"type": kind, "message": "words"},
        "request_id": "req_1",
    }
    assert error_status(made) == made.status


@pytest.mark.parametrize("kind", [ContextTooLong, PayloadTooLarge])
def test_too_long_a_prompt_is_worded_so_that_agents_compact(kind):
    error = kind("the prompt does not fit", max=8192, prompt_tokens=9000)
    assert error_body(error)["error"] == {
        "type": "invalid_request_error",
        "message": "prompt is too long: 9000 tokens > 8192 maximum",
    }
    assert error_status(error) == 400


def test_the_numbers_that_a_neuron_gives_to_messages_are_left_out():
    text = "messages[3].content[0] is of type 'image_url'; this model reads only text"
    members = {"message": text, "type": "invalid_request_error", "param": "messages[3].content[0]"}
    error = parse_error(400, json.dumps({"error": members}).encode())
    told = "a block of 'messages' is of type 'image_url'; this model reads only text"
    assert error_body(error)["error"] == {"type": "invalid_request_error", "message": told}
    ours = InvalidParameter(text, param="messages[3].content[0]")
    assert error_body(ours)["error"]["message"] == text


def test_other_refusals_of_the_client_are_invalid_requests():
    error = BadRequest("words")
    error.status = 405
    assert error_body(error)["error"]["type"] == "invalid_request_error"
