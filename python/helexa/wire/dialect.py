"""What the gateway needs of an API dialect: a request as canonical chat, and the answer back.

The neuron speaks OpenAI chat completions. Each other dialect is a module of `wire` that parses its requests
into a canonical body and has a translator that turns the canonical answer into its own. Pure data in, pure
data out.
"""

from typing import Protocol

import msgspec

from helexa.errors import HelexaError


class SaidFunction(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class SaidCall(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: SaidFunction | None = None


class Said(msgspec.Struct):
    """A delta of a canonical stream, or the message of a whole answer, as far as dialects tell it on.

    Other servers leave out what is not needed; `reasoning` is what some of them call it.
    """

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[SaidCall] | None = None

    @property
    def thought(self) -> str:
        return self.reasoning_content or self.reasoning or ""


class Count(msgspec.Struct):
    """What is read of the neuron's answer to `/tokenize`."""

    count: int


class Translator(Protocol):
    """The answer of one request in its dialect. A stream is `feed`, …, then `finish` or `failure`, once.

    The first bytes of a stream may come from `keep_alive`, before the neuron has answered, and are then valid
    events of the dialect like all others.
    """

    def feed(self, events: bytes) -> bytes:
        """The dialect's events for whole canonical events (and comments); empty if there are none yet."""

    def keep_alive(self) -> bytes:
        """A sign of life for a moment of silence, which leaves the answer as it is."""

    def finish(self) -> bytes:
        """The end of a stream whose `[DONE]` was fed."""

    def failure(self, error: HelexaError) -> bytes:
        """The end of a stream that failed or broke off, as the dialect says it."""

    def whole(self, body: bytes) -> bytes:
        """The dialect's answer for a whole canonical answer."""


class NeverStreamed:
    """The part of a translator that has nothing to do where answers come whole."""

    def feed(self, events: bytes) -> bytes:
        return b""

    def keep_alive(self) -> bytes:
        return b""

    def finish(self) -> bytes:
        return b""
