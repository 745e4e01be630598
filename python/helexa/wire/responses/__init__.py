"""OpenAI Responses as pure data: requests into canonical chat, canonical answers into responses."""

from helexa.wire.responses.items import listed
from helexa.wire.responses.request import ResponsesRequest, parse_responses
from helexa.wire.responses.translator import CountTranslator, ResponseTranslator, renamed
from helexa.wire.responses.truncation import shortened

__all__ = [
    "CountTranslator",
    "ResponseTranslator",
    "ResponsesRequest",
    "listed",
    "parse_responses",
    "renamed",
    "shortened",
]
