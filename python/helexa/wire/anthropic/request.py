"""The body of POST /v1/messages and /v1/messages/count_tokens, and the canonical chat request that it means.

What needs Anthropic's servers (containers, MCP connectors, threads, hosted tools) is refused; what concerns
only its caches, tiers or context editing is accepted and has no effect.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from helexa.errors import InvalidParameter, MissingModel
from helexa.wire.anthropic.content import Content, Message, canonical_messages
from helexa.wire.body import decode
from helexa.wire.generation import MAX_STOPS, Positive, Share

# Clients that would have the server hold a conversation send all of it when they are told so in this form.
_DETAILS: dict[str, dict[str, Any]] = {
    "thread": {"details": {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}}
}

Effort = Literal["low", "medium", "high", "xhigh", "max"]


class Thinking(msgspec.Struct):
    """`adaptive` leaves it to the effort; with `omitted` the text of the thoughts is not sent."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Positive | None = None
    display: str | None = None


class OutputFormat(msgspec.Struct):
    schema: dict[str, Any]
    type: Literal["json_schema"] = "json_schema"


class OutputConfig(msgspec.Struct):
    effort: Effort | None = None
    format: OutputFormat | None = None


class Tool(msgspec.Struct):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class MessagesRequest(msgspec.Struct, kw_only=True):
    """None is "not given" throughout."""

    model: str
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Positive | None = None
    system: Content | None = None
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31)] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    cache_control: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None
    inference_geo: str | None = None
    diagnostics: dict[str, Any] | None = None
    speed: str | None = None
    container: Any = None
    mcp_servers: list[Any] | None = None
    compaction: Any = None
    thread: Any = None

    def __post_init__(self) -> None:
        if not self.model:
            raise MissingModel("the request names no model; 'model' is empty", param="model")
        if len(self.stop_sequences or ()) > MAX_STOPS:
            count = len(self.stop_sequences or ())
            message = f"'stop_sequences' has {count} strings; at most {MAX_STOPS} are allowed"
            raise InvalidParameter(message, param="stop_sequences")
        if "" in (self.stop_sequences or ()):
            message = "'stop_sequences' has an empty string; expected text to stop at"
            raise InvalidParameter(message, param="stop_sequences")
        self._check_thinking()
        for name in ("container", "mcp_servers", "compaction", "thread"):
            if getattr(self, name):
                message = f"'{name}' is not supported here; leave it out"
                raise InvalidParameter(message, param=name, **_DETAILS.get(name, {}))
        for index, tool in enumerate(self.tools or ()):
            _check_tool(tool, f"tools[{index}]")
        if self.tool_choice is not None and self.tool_choice.type == "tool" and not self.tool_choice.name:
            raise InvalidParameter("missing required field 'tool_choice.name'", param="tool_choice.name")

    @property
    def is_thinking(self) -> bool:
        return self.thinking is not None and self.thinking.type != "disabled"

    @property
    def omits_thinking(self) -> bool:
        return self.thinking is not None and self.thinking.display == "omitted"

    def to_chat(self, *, normalize_billing: bool = True) -> bytes:
        """The canonical body. Raises InvalidParameter."""
        if self.max_tokens is None:
            raise InvalidParameter("missing required field 'max_tokens'", param="max_tokens")
        if self.messages[-1].role == "assistant":
            path = f"messages[{len(self.messages) - 1}]"
            message = f"'{path}' is of the assistant; a conversation must end with a user's message"
            raise InvalidParameter(message, param=path)
        chat = self._prompt(normalize_billing)
        chat["max_tokens"] = self.max_tokens
        for name in ("temperature", "top_p", "top_k"):
            if (value := getattr(self, name)) is not None:
                chat[name] = value
        if self.stop_sequences:
            chat["stop"] = self.stop_sequences
        if self.stream:
            chat |= {"stream": True, "stream_options": {"include_usage": True}}
        return msgspec.json.encode(chat)

    def to_tokenize(self, *, normalize_billing: bool = True) -> bytes:
        """The canonical body that asks how many tokens the prompt has. Raises InvalidParameter."""
        return msgspec.json.encode(self._prompt(normalize_billing))

    def _prompt(self, normalize_billing: bool) -> dict[str, Any]:
        """What the prompt depends on."""
        chat: dict[str, Any] = {
            "model": self.model,
            "messages": canonical_messages(self.system, self.messages, normalize_billing=normalize_billing),
            **self._thinking(),
            **self._tools(),
        }
        config = self.output_config or OutputConfig()
        if form := config.format or self.output_format:
            schema = {"name": "output", "schema": form.schema, "strict": True}
            chat["response_format"] = {"type": "json_schema", "json_schema": schema}
        return chat

    def _thinking(self) -> dict[str, Any]:
        """Without a wish there is none, as in Anthropic's API."""
        if not self.is_thinking:
            return {"chat_template_kwargs": {"enable_thinking": False}, "thinking_budget": 0}
        found: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": True}}
        if self.thinking is not None and self.thinking.budget_tokens is not None:
            return found | {"thinking_budget": self.thinking.budget_tokens}
        effort = self.output_config.effort if self.output_config else None
        return found | {"reasoning_effort": effort} if effort else found

    def _tools(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.tools:
            found["tools"] = [_canonical_tool(tool) for tool in self.tools]
        if choice := self.tool_choice:
            if choice.type == "tool":
                found["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
            elif self.tools or choice.type == "any":
                found["tool_choice"] = "required" if choice.type == "any" else choice.type
            if choice.disable_parallel_tool_use:
                found["parallel_tool_calls"] = False
        return found

    def _check_thinking(self) -> None:
        thinking = self.thinking
        if thinking is None or thinking.type != "enabled":
            return
        param = "thinking.budget_tokens"
        if thinking.budget_tokens is None:
            raise InvalidParameter(f"missing required field '{param}'", param=param)
        if self.max_tokens is not None and thinking.budget_tokens >= self.max_tokens:
            message = (
                f"'{param}' is {thinking.budget_tokens}; expected less than max_tokens, {self.max_tokens}"
            )
            raise InvalidParameter(message, param=param)


class _Strict(MessagesRequest, kw_only=True, forbid_unknown_fields=True):
    pass


def parse_messages(body: bytes, *, is_beta: bool = False) -> MessagesRequest:
    """The request in `body`. Raises MalformedJson, MissingModel or InvalidParameter naming the field.

    is_beta: the client says by a header that it sends fields of betas, so unknown ones are let pass.
    """
    return decode(body, MessagesRequest if is_beta else _Strict)


def _check_tool(tool: Tool, path: str) -> None:
    if tool.type not in (None, "custom"):
        message = (
            f"'{path}.type' is {tool.type!r:.80}; only tools that the client runs ('custom') are supported"
        )
        raise InvalidParameter(message, param=f"{path}.type")
    if tool.input_schema is None:
        raise InvalidParameter(f"missing required field '{path}.input_schema'", param=f"{path}.input_schema")


def _canonical_tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}
