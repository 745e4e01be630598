"""`truncation: auto`: a canonical request that was too long, without the oldest of its conversation."""

from typing import Any

import msgspec

from helexa.errors import HelexaError
from helexa.wire.generation import encode

ROOM_TOKENS = 1024  # for the answer, where the request does not say how long it may be
_MARGIN = 1.05  # tokens are not spread evenly over the text

Json = dict[str, Any]


def shortened(body: bytes, refusal: HelexaError) -> bytes | None:
    """The request as it probably fits the context that the refusal tells of; None if that cannot be.

    What leads the conversation stays, and so does its last message. The results of a call go with it, and if
    there is a later message of the user, what is left begins with that.
    """
    most, found = refusal.extra.get("max"), refusal.extra.get("prompt_tokens")
    if not isinstance(most, int) or not isinstance(found, int) or found <= 0:
        return None
    asked: Json = msgspec.json.decode(body)
    messages: list[Json] = asked["messages"]
    start = 1 if messages[0]["role"] == "system" else 0
    room = min(asked.get("max_completion_tokens") or ROOM_TOKENS, most // 2)
    sizes = [len(encode(message)) for message in messages]
    whole = sum(sizes) + len(encode(asked.get("tools")))
    excess = whole * (found - most + room) / found * _MARGIN
    left = [index for index in range(start + 1, len(messages)) if sum(sizes[start:index]) >= excess]
    left = left or [len(messages) - 1]
    begin = next((index for index in left if messages[index]["role"] == "user"), None)
    if begin is None:
        begin = next((index for index in left if messages[index]["role"] != "tool"), None)
    if begin is None or begin <= start:
        return None
    asked["messages"] = messages[:start] + messages[begin:]
    return encode(asked)
