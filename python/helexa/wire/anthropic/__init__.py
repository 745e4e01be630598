"""Anthropic Messages: requests as canonical chat, canonical answers as messages and their events."""

from helexa.wire.anthropic.answer import CountTranslator, MessagesTranslator
from helexa.wire.anthropic.errors import error_body, error_status
from helexa.wire.anthropic.request import MessagesRequest, parse_messages

__all__ = [
    "CountTranslator",
    "MessagesRequest",
    "MessagesTranslator",
    "error_body",
    "error_status",
    "parse_messages",
]
