"""OpenAI text completions: no chat template, prompts as text or token ids."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from helexa.errors import InvalidParameter
from helexa.wire.body import decode
from helexa.wire.generation import MAX_CHOICES, FinishReason, GenerationRequest, Usage

Prompt = str | list[int]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


def as_prompts(given: str | list[str | TokenId | list[TokenId]], param: str) -> list[Prompt]:
    """What a prompt field may hold, as a list. Raises InvalidParameter for an empty prompt or a mixture."""
    if isinstance(given, str):
        prompts: list[Prompt] = [given]
    else:
        ids = [item for item in given if isinstance(item, int)]
        if ids and len(ids) < len(given):
            raise InvalidParameter(f"'{param}' mixes token ids with other prompts", param=param)
        prompts = [ids] if ids else [item for item in given if not isinstance(item, int)]
    if not prompts or not all(prompts):
        raise InvalidParameter(f"'{param}' is empty; expected text or token ids", param=param)
    return prompts


class CompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/completions."""

    prompt: str | list[str | TokenId | list[TokenId]]
    max_tokens: Annotated[int, Meta(ge=0, le=2**53)] | None = None  # 0 with echo: nothing but the prompt
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    suffix: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        prompts = self.prompts
        if len(prompts) * self.num_choices > MAX_CHOICES:
            message = (
                f"{len(prompts)} prompts with n={self.num_choices}; at most {MAX_CHOICES} answers are allowed"
            )
            raise InvalidParameter(message, param="n")
        if self.suffix:
            raise InvalidParameter("'suffix' is not supported; leave it out", param="suffix")
        if self.best_of is not None and self.best_of != self.num_choices:
            message = (
                f"'best_of' is {self.best_of}; only best_of equal to n ({self.num_choices}) is supported"
            )
            raise InvalidParameter(message, param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidParameter("'max_tokens' is 0, which is only of use with 'echo'", param="max_tokens")

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, each a text or a list of token ids; a flat list of integers is one prompt."""
        return as_prompts(self.prompt, "prompt")

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


def parse_completion(body: bytes) -> CompletionRequest:
    """The request in `body`. Raises MalformedJson, MissingModel or InvalidParameter naming the field."""
    return decode(body, CompletionRequest)


class CompletionLogprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float | None]  # null for the first token of a prompt, of which nothing is known
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | msgspec.UnsetType = msgspec.UNSET  # extension: the stop string that ended the text


class CompletionAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer, and each chunk of a stream."""

    id: str
    object: Literal["text_completion"] = msgspec.field(default_factory=lambda: "text_completion")
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
