"""The request of POST /v1/responses: checked, and written as a canonical chat request.

What only a hosted platform has (background work, conversations, prompt templates) is refused by name. What
the neuron judges (ranges, schemas, content that is not text) is left to it.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from helexa.errors import InvalidParameter, MissingModel
from helexa.wire.body import decode
from helexa.wire.generation import Positive
from helexa.wire.responses.items import Conversation, kind_of
from helexa.wire.responses.tools import Tools, added_tools

Json = dict[str, Any]

_REFUSED = {
    "background": "answers are not made in the background; leave it out",
    "conversation": "conversations are not kept; use 'previous_response_id'",
    "prompt": "there are no stored prompts; use 'instructions'",
    "context_management": "the input is not compacted; leave it out",
    "moderation": "nothing is moderated; leave it out",
    "generate": "every request generates; leave it out",
}
# Passed on under the same name: sampling, and the extensions that chat has.
_SAME = (
    "temperature", "top_p", "parallel_tool_calls", "user", "safety_identifier", "prompt_cache_key",
    "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "seed", "stop", "chat_template_kwargs", "thinking_budget",
)  # fmt: skip
# What a neuron calls a field, and what the client called it.
FIELD_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "messages": "input",
}
Include = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]
Label = Annotated[str, Meta(max_length=512)]


class Reasoning(msgspec.Struct, omit_defaults=True):
    effort: str | None = None
    summary: Literal["auto", "concise", "detailed", "none"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None  # its former name

    @property
    def asked_summary(self) -> str | None:
        asked = self.summary or self.generate_summary
        return None if asked == "none" else asked


class Text(msgspec.Struct, omit_defaults=True):
    format: Json | None = None
    verbosity: str | None = None


class ResponsesRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/responses. None is "not given" throughout."""

    model: str
    input: str | list[Json] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: Json | None = None
    include: list[Include] | None = None
    max_output_tokens: Positive | None = None
    max_tool_calls: Positive | None = None
    metadata: Annotated[dict[str, Label], Meta(max_length=16)] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: Text | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    truncation: Literal["auto", "disabled"] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # accepted, without effect
    prompt_cache_retention: str | None = None
    prompt_cache_options: Json | None = None
    service_tier: str | None = None
    client_metadata: Json | None = None
    access_programs: Json | None = None
    image: Json | None = None
    # refused when they ask for something
    background: bool | None = None
    conversation: str | Json | None = None
    prompt: Json | None = None
    context_management: list[Json] | None = None
    moderation: Json | None = None
    generate: bool | None = None
    # extensions
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    chat_template_kwargs: Json | None = None
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        if not self.model:
            raise MissingModel("the request names no model; 'model' is empty", param="model")
        for name, instead in _REFUSED.items():
            if getattr(self, name) not in (None, [], name == "generate"):
                raise InvalidParameter(f"'{name}' is not supported: {instead}", param=name)
        if not self.input and self.previous_response_id is None:
            raise InvalidParameter("'input' is missing; expected a text or a list of items", param="input")
        if self.top_logprobs is not None and not self.wants_logprobs:
            message = "'top_logprobs' is only allowed with 'message.output_text.logprobs' in 'include'"
            raise InvalidParameter(message, param="top_logprobs")

    @property
    def items(self) -> list[Json]:
        """The input as items."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}] if self.input else []
        return self.input or []

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    @property
    def wants_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ())

    @property
    def wants_sealed_reasoning(self) -> bool:
        return "reasoning.encrypted_content" in (self.include or ())

    @property
    def wants_summary(self) -> bool:
        """Whether reasoning is told as a summary, which clients show, and not as its raw text."""
        return self.reasoning is not None and self.reasoning.asked_summary is not None

    @property
    def references(self) -> list[str]:
        """The ids of stored items that the input refers to."""
        return [str(item.get("id")) for item in self.items if kind_of(item) == "item_reference"]

    def to_chat(self, items: Sequence[Json], *, history: Sequence[Json] = ()) -> tuple[bytes, Tools]:
        """The canonical body, and the tools as it names them.

        items: the input, with references resolved. history: the items of earlier responses, in order. Raises
        InvalidParameter for what a model cannot read.
        """
        tools = Tools(self.tools or (), self.tool_choice, added_tools([*history, *items]))
        conversation = Conversation(self.instructions)
        conversation.extend(history, "previous_response_id")
        conversation.extend(items, "input")
        if not conversation.messages:
            raise InvalidParameter("'input' has no messages; expected some text", param="input")
        body: Json = {"model": self.model, "messages": conversation.messages}
        if tools.functions:
            body["tools"] = tools.functions
        if tools.choice is not None:
            body["tool_choice"] = tools.choice
        body |= {name: value for name in _SAME if (value := getattr(self, name)) is not None}
        body |= self._renamed()
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return msgspec.json.encode(body), tools

    def _renamed(self) -> Json:
        """The fields that chat calls otherwise."""
        renamed: Json = {}
        if self.max_output_tokens is not None:
            renamed["max_completion_tokens"] = self.max_output_tokens
        if self.reasoning is not None and self.reasoning.effort is not None:
            renamed["reasoning_effort"] = self.reasoning.effort
        if (answer_format := self._response_format()) is not None:
            renamed["response_format"] = answer_format
        if self.wants_logprobs:
            renamed |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        return renamed

    def _response_format(self) -> Json | None:
        wanted = self.text.format if self.text is not None else None
        if wanted is None or wanted.get("type") == "text":
            return None
        kind = wanted.get("type")
        if kind == "json_object":
            return {"type": "json_object"}
        if kind != "json_schema":
            message = f"'text.format.type' is {kind!r:.80}; expected text, json_object or json_schema"
            raise InvalidParameter(message, param="text.format.type")
        if not isinstance(wanted.get("schema"), dict):
            raise InvalidParameter(
                "'text.format.schema' is missing; expected a JSON schema", param="text.format.schema"
            )
        names = ("name", "schema", "strict", "description")
        return {
            "type": kind,
            "json_schema": {key: wanted[key] for key in names if wanted.get(key) is not None},
        }

    def resolved(self, referenced: Mapping[str, Json]) -> list[Json]:
        """The input with the items in place of the references to them. InvalidParameter for one not there."""
        if missing := next((item_id for item_id in self.references if item_id not in referenced), None):
            message = f"the input refers to the item {missing!r:.80}, which is not stored"
            raise InvalidParameter(message, param="input")
        return [
            referenced[str(item["id"])] if kind_of(item) == "item_reference" else item for item in self.items
        ]


def parse_responses(body: bytes) -> ResponsesRequest:
    """The request in `body`. Raises MalformedJson, MissingModel or InvalidParameter naming the field."""
    return decode(body, ResponsesRequest)
