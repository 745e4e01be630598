"""Anthropic Messages at the gateway."""

from collections.abc import Mapping

import orjson

from helexa.errors import HelexaError
from helexa.gateway.config import AnthropicSection
from helexa.gateway.dialects import CHAT_PATH, Asked, Dialect, Job, Refusal
from helexa.wire.anthropic import (
    CountTranslator,
    MessagesRequest,
    MessagesTranslator,
    error_body,
    error_status,
    parse_messages,
)
from helexa.wire.errors import error_headers

PATH = "/v1/messages"
COUNT_PATH = PATH + "/count_tokens"
_ID_HEADER = "request-id"


def anthropic(config: AnthropicSection) -> Dialect:
    """The dialect: messages, and the count of their tokens."""

    async def messages(asked: Asked) -> Job:
        request = _parse(asked.body, asked.headers)
        body = request.to_chat(normalize_billing=config.normalize_billing_line)
        translator = MessagesTranslator(
            request.model, request.max_tokens or 0, omits_thinking=request.omits_thinking
        )
        return Job(CHAT_PATH, request.model, body, request.stream is True, translator)

    async def count_tokens(asked: Asked) -> Job:
        request = _parse(asked.body, asked.headers)
        body = request.to_tokenize(normalize_billing=config.normalize_billing_line)
        return Job("/tokenize", request.model, body, False, CountTranslator())

    generating = {PATH: messages, COUNT_PATH: count_tokens}
    return Dialect("anthropic", (PATH,), generating, refuse=_refuse, id_header=_ID_HEADER)


def _parse(body: bytes, headers: Mapping[str, str]) -> MessagesRequest:
    return parse_messages(body, is_beta="anthropic-beta" in headers)


def _refuse(error: HelexaError, request_id: str) -> Refusal:
    ids = {"x-request-id": request_id, _ID_HEADER: request_id}
    headers = {"content-type": "application/json", **ids, **error_headers(error)}
    return Refusal(error_status(error), headers, orjson.dumps(error_body(error, request_id)))
