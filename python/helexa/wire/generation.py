"""What chat and text completions share: a request's sampling fields, token usage, the reasons to finish."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from helexa.errors import InvalidParameter, MissingModel

FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "error"]
# A request header of the gateway: a stream then ends with its usage as a comment, which no client sees as an
# event, even if the client did not ask for it.
USAGE_HEADER = "x-helexa-usage"
# Who asks, and how urgently (an integer, higher first): stamped by the gateway, which drops clients' own.
PRINCIPAL_HEADER = "x-helexa-principal"
PRIORITY_HEADER = "x-helexa-priority"
MAX_STOPS = 16
MAX_CHOICES = 128

Positive = Annotated[int, Meta(ge=1, le=2**53)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields of every generating route. None is "not given" throughout, as clients send null for it."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Positive | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    user: str | None = None
    # extensions
    top_k: Annotated[int, Meta(ge=-1, le=2**31)] | None = None
    min_p: Share | None = None
    typical_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    stop_token_ids: list[Annotated[int, Meta(ge=0)]] | None = None
    ignore_eos: bool | None = None

    def __post_init__(self) -> None:
        if not self.model:
            raise MissingModel("the request names no model; 'model' is empty", param="model")
        if self.stream_options is not None and not self.stream:
            raise InvalidParameter(
                "'stream_options' is only allowed with 'stream': true", param="stream_options"
            )
        if len(self.stops) > MAX_STOPS:
            message = f"'stop' has {len(self.stops)} strings; at most {MAX_STOPS} are allowed"
            raise InvalidParameter(message, param="stop")
        if "" in self.stops:
            raise InvalidParameter("'stop' has an empty string; expected text to stop at", param="stop")
        for key in self.logit_bias or ():
            if not key.isdecimal() or not key.isascii() or len(key) > 9:
                message = f"'logit_bias' has the key {key!r:.80}; expected a token id"
                raise InvalidParameter(message, param="logit_bias")

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def token_bias(self) -> dict[int, float] | None:
        return {int(key): value for key, value in self.logit_bias.items()} if self.logit_bias else None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0


class Timing(msgspec.Struct, frozen=True):
    """Extension: where the time went; `prefill_tokens` were computed, a share `reuse_ratio` was cached."""

    prefill_ms: float
    decode_ms: float
    queue_ms: float
    prefill_tokens: int
    reuse_ratio: float = 0.0


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None
    helexa_timing: Timing | None = None


def encode(answer: Any) -> bytes:
    """An answer of the wire as JSON on one line."""
    return msgspec.json.encode(answer)
