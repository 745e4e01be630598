"""OpenAI chat completions: the canonical request, answer and stream chunks of helexa.

Every documented field is a member, so an unknown one is an error that names it. A well-formed field that a
server cannot honour is the server's to refuse.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from helexa.errors import InvalidParameter
from helexa.wire.body import decode
from helexa.wire.generation import FinishReason, GenerationRequest, Positive, Usage

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
Role = Literal["system", "developer", "user", "assistant", "tool"]


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message; `text` and `refusal` parts are text, others name themselves by `type`."""

    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(msgspec.Struct):
    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"


class FunctionCallDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """The first delta of a call has its whole name; the arguments of all deltas together are JSON."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """`index` tells calls apart; `id`, `type` and the name come with the first delta of a call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta | None = None


class Message(msgspec.Struct, omit_defaults=True):
    """A turn. Members that clients echo from earlier answers (annotations, refusal, …) are ignored."""

    role: Role
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    function_call: Any = None
    audio: Any = None


class Function(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    type: str
    function: Function | None = None

    @property
    def name(self) -> str:
        return self.function.name if self.function else ""


class ResponseFormat(msgspec.Struct):
    """What the answer must be; `regex` and `grammar` (in Lark's syntax) are extensions."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: dict[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None


class ChatRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # extensions
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_budget: Annotated[int, Meta(ge=0, le=2**31)] | None = None  # tokens; 0 turns thinking off

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidParameter(
                "'top_logprobs' is only allowed with 'logprobs': true", param="top_logprobs"
            )
        for index, message in enumerate(self.messages):
            _check_message(message, f"messages[{index}]")
        for index, tool in enumerate(self.tools or ()):
            _check_tool(tool, f"tools[{index}]")
        _check_tool_choice(self.tool_choice, [tool.name for tool in self.tools or ()])
        if self.reasoning_effort is not None and self.reasoning_effort not in EFFORTS:
            raise InvalidParameter(
                f"'reasoning_effort' is {self.reasoning_effort!r:.80}; expected one of {', '.join(EFFORTS)}",
                param="reasoning_effort",
            )

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that may be called."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forced_tool(self) -> str | None:
        """The name of the tool that must be called, "required" if any must; None if none needs to."""
        if isinstance(self.tool_choice, dict):
            return str(self.tool_choice["function"]["name"])
        return "required" if self.tool_choice == "required" else None

    @property
    def wants_reasoning(self) -> bool | None:
        """Whether the model is to reason; None if the request leaves that to the model."""
        if self.thinking_budget is not None:
            return self.thinking_budget > 0
        switch = (self.chat_template_kwargs or {}).get("enable_thinking")
        if isinstance(switch, bool):
            return switch
        return None if self.reasoning_effort is None else self.reasoning_effort != "none"

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def _check_message(message: Message, param: str) -> None:
    for name, value, instead in (
        ("function_call", message.function_call, "use 'tool_calls'"),
        ("audio", message.audio, "models here read only text"),
    ):
        if value is not None:
            param = f"{param}.{name}"
            raise InvalidParameter(f"'{param}' is not supported here; {instead}", param=param)


def _check_tool(tool: Tool, param: str) -> None:
    if tool.type != "function":
        message = f"'{param}.type' is {tool.type!r:.80}; expected 'function', others are not run here"
        raise InvalidParameter(message, param=f"{param}.type")
    if tool.function is None or not tool.function.name.strip():
        problem = "is missing" if tool.function is None else "has an empty name"
        raise InvalidParameter(
            f"'{param}.function' {problem}; expected a function", param=f"{param}.function"
        )


def _check_tool_choice(choice: str | dict[str, Any] | None, names: list[str]) -> None:
    if choice in (None, "none", "auto"):
        return
    if not names:
        raise InvalidParameter("'tool_choice' is only allowed with 'tools'", param="tool_choice")
    if choice == "required":
        return
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidParameter(
            f"'tool_choice' is {choice!r:.80}; expected 'none', 'auto', 'required' or "
            "{'type': 'function', 'function': {'name': …}}",
            param="tool_choice",
        )
    if function["name"] not in names:
        message = f"'tool_choice' names {function['name']!r:.80}; the tools are {', '.join(names):.400}"
        raise InvalidParameter(message, param="tool_choice")


def parse_chat(body: bytes) -> ChatRequest:
    """The request in `body`. Raises MalformedJson, MissingModel or InvalidParameter naming the field."""
    return decode(body, ChatRequest)


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(msgspec.Struct, frozen=True):
    content: list[TokenLogprob]


class AnswerMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    content: str | None
    role: Literal["assistant"] = msgspec.field(
        default_factory=lambda: "assistant"
    )  # a factory: never omitted
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class Choice(msgspec.Struct, frozen=True):
    """`stop_reason` is an extension, as other servers have it: the stop string that ended the text."""

    index: int
    message: AnswerMessage
    finish_reason: FinishReason | None
    logprobs: ChoiceLogprobs | None = None
    stop_reason: str | msgspec.UnsetType = msgspec.UNSET


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChatDelta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event of a stream; the usage chunk has no choices."""

    id: str
    object: str = msgspec.field(default_factory=lambda: "chat.completion.chunk")
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
