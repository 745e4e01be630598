"""GET /v1/models: the OpenAI listing with the extensions that clients of local servers look for."""

from typing import Literal

import msgspec

from helexa.wire.control import Limit


class ModelCard(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model; `max_model_len` repeats `limit.context` for clients that know only that name."""

    id: str
    object: Literal["model"] = msgspec.field(default_factory=lambda: "model")
    created: int
    owned_by: str = msgspec.field(default_factory=lambda: "helexa")
    loaded: bool
    capabilities: list[str] = []
    tool_call: bool = False
    reasoning: bool = False
    limit: Limit | None = None
    max_model_len: int | None = None


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelCard]
    object: Literal["list"] = "list"
