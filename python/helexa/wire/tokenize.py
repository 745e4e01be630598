"""POST /tokenize and /detokenize: extensions of the neuron, with the members that other servers have.

What is to be tokenized is a plain `prompt`, or all that a chat request may have, which is then counted as the
chat route would count it, template and tools included.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from helexa.errors import MissingModel
from helexa.wire.body import decode
from helexa.wire.chat import ChatRequest, parse_chat
from helexa.wire.completions import TokenId


class _Shape(msgspec.Struct):
    messages: Any = None


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /tokenize for a text."""

    model: str
    prompt: str
    add_special_tokens: bool | None = None  # with what the file wants around a text; not given: yes

    def __post_init__(self) -> None:
        _require_model(self.model)


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /detokenize."""

    model: str
    tokens: Annotated[list[TokenId], Meta(max_length=2**20)]

    def __post_init__(self) -> None:
        _require_model(self.model)


class TokenizeAnswer(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeAnswer(msgspec.Struct, frozen=True):
    prompt: str


def parse_tokenize(body: bytes) -> TokenizeRequest | ChatRequest:
    """The request in `body`: a chat request if it has messages. Raises like `parse_chat`."""
    if decode(body, _Shape).messages is not None:
        return parse_chat(body)
    return decode(body, TokenizeRequest)


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """The request in `body`. Raises MalformedJson, MissingModel or InvalidParameter naming the field."""
    return decode(body, DetokenizeRequest)


def _require_model(model: str) -> None:
    if not model:
        raise MissingModel("the request names no model; 'model' is empty", param="model")
