"""Every error that helexa reports to a user, as one tree.

Each class carries the HTTP `status` and the machine-readable `code` of the envelope; instances may add the
`param` (request field) at fault and `retry_after_s`. Nothing here imports anything of helexa.
"""


class HelexaError(Exception):
    """Root of all errors with a message meant for the user."""

    status = 500
    code = "internal_error"
    type = "api_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None, **extra: object
    ):
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.extra = extra  # further members of the error envelope, e.g. max and prompt_tokens


def error_codes() -> frozenset[str]:
    """The codes of all errors of this tree."""
    kinds = [HelexaError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return frozenset(kind.code for kind in kinds)


class BadRequest(HelexaError):
    """The request cannot be served as it stands; sending it again unchanged will fail again."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class MalformedJson(BadRequest):
    """The body is not JSON."""

    code = "malformed_json"


class InvalidParameter(BadRequest):
    """A field of the request has the wrong type or value; `param` names it."""

    code = "invalid_parameter"


class MissingModel(BadRequest):
    """The request names no model."""

    code = "missing_model_field"


class ContextTooLong(BadRequest):
    """Prompt and requested output do not fit the model's context."""

    code = "context_length_exceeded"


class PayloadTooLarge(BadRequest):
    """The body is larger than the configured limit, or the prompt than all of the KV cache."""

    status = 413
    code = "payload_too_large"


class UnknownModel(BadRequest):
    """No model of that name is known."""

    status = 404
    code = "model_not_found"


class NotFound(BadRequest):
    """No such route."""

    status = 404
    code = "not_found"


class UnknownResponse(BadRequest):
    """No response of that id is stored; it may have expired, or belong to another key."""

    status = 404
    code = "response_not_found"


class UnknownPreviousResponse(BadRequest):
    """The request continues a response that is not stored any more, or never was."""

    code = "previous_response_not_found"


class Unauthorized(HelexaError):
    """A key is required and is missing or wrong."""

    status = 401
    code = "invalid_api_key"
    type = "invalid_request_error"


class Forbidden(HelexaError):
    """The key is known, and may not do this."""

    status = 403
    code = "permission_denied"
    type = "permission_error"


class QuotaExceeded(HelexaError):
    """The key has used up its share; `retry_after_s` says when there is more."""

    status = 429
    code = "rate_limit_exceeded"
    type = "rate_limit_error"


class Unavailable(HelexaError):
    """Cannot be served now; a later try may succeed."""

    status = 503
    code = "service_unavailable"

    def __init__(self, message: str, *, retry_after_s: float | None = 5, **keywords: object):
        super().__init__(message, retry_after_s=retry_after_s, **keywords)  # type: ignore[arg-type]


class ModelLoading(Unavailable):
    """The model is being loaded."""

    code = "model_loading"


class LoadFailed(Unavailable):
    """The last load of the model failed, and nobody has asked for another one since."""

    code = "model_load_failed"


class Overloaded(Unavailable):
    """The queue is full, or the wait for a seat was too long."""

    code = "rate_limit_exceeded"
    type = "rate_limit_error"


class NoPlacement(Unavailable):
    """No node can take the model now."""


class CannotHost(NoPlacement):
    """No node of the fleet could ever hold the model, so that trying again is of no use."""

    status = 404

    def __init__(self, message: str, *, retry_after_s: float | None = None, **keywords: object):
        super().__init__(message, retry_after_s=retry_after_s, **keywords)


class ShuttingDown(Unavailable):
    """The process is draining."""

    code = "shutting_down"


class DeviceError(HelexaError):
    """Something failed on a compute device."""

    status = 503
    code = "device_error"


class OutOfMemory(DeviceError):
    """The device has too little free memory."""

    code = "insufficient_memory"


class DevicePoisoned(DeviceError):
    """An earlier fault left the device's worker unusable until the model is loaded again."""

    code = "device_poisoned"


class UpstreamError(HelexaError):
    """A neuron failed to answer."""

    status = 502
    code = "upstream_error"


class UpstreamTimeout(UpstreamError):
    """A neuron did not answer in time."""

    status = 504
    code = "upstream_timeout"


class UpstreamClosed(UpstreamError):
    """A neuron closed the connection before its answer was complete."""

    code = "upstream_connection_error"


class InvalidFile(HelexaError):
    """A weight file is malformed; the message names the place, what was found and what was expected."""

    status = 422
    code = "invalid_model_file"
    type = "invalid_request_error"


class UnsupportedModel(InvalidFile):
    """A well-formed file of an architecture, tensor type or tokenizer that is not implemented."""

    code = "unsupported_model"


class SourceError(HelexaError):
    """A model could not be found or fetched."""

    status = 422
    code = "repo_fetch_failed"


class ConfigError(HelexaError):
    """A configuration file or environment override is wrong; the message names file and key."""

    status = 422
    code = "invalid_configuration"
