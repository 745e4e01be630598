"""OpenAI Responses as pure data: requests into canonical chat, canonical answers into responses."""

from helexa.wire.responses.request import ResponsesRequest, parse_responses
from helexa.wire.responses.translator import ResponseTranslator, refusal

__all__ = ["ResponseTranslator", "ResponsesRequest", "parse_responses", "refusal"]
