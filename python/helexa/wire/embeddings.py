"""OpenAI embeddings: texts or token ids in, a vector each: numbers, or base64 of little-endian float32."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from helexa.errors import InvalidParameter, MissingModel
from helexa.wire.body import decode
from helexa.wire.completions import Prompt, TokenId, as_prompts

MAX_INPUTS = 2048


class EmbeddingRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/embeddings; `pooling` is an extension."""

    model: str
    input: str | list[str | TokenId | list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    user: str | None = None
    pooling: Literal["mean", "last"] | None = None

    def __post_init__(self) -> None:
        if not self.model:
            raise MissingModel("the request names no model; 'model' is empty", param="model")
        if len(self.inputs) > MAX_INPUTS and not isinstance(self.input, str):
            message = f"'input' has {len(self.inputs)} items; at most {MAX_INPUTS} are allowed"
            raise InvalidParameter(message, param="input")

    @property
    def inputs(self) -> list[Prompt]:
        """The inputs, each a text or a list of token ids. Raises InvalidParameter for an empty one."""
        return as_prompts(self.input, "input")


def parse_embedding(body: bytes) -> EmbeddingRequest:
    """The request in `body`. Raises MalformedJson, MissingModel or InvalidParameter naming the field."""
    return decode(body, EmbeddingRequest)


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
