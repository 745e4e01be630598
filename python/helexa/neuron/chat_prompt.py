"""A chat request as a prompt: rendered by the model's own template, continued from the kept turns."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from helexa.engine.chat_template import ChatTemplate
from helexa.engine.engine import Engine
from helexa.errors import BadRequest, InvalidParameter
from helexa.neuron.prompt import MOST_COUNTED, check_length, fitting, require_tokenizer
from helexa.neuron.turns import Turn, TurnStore, conversation_keys, next_key
from helexa.wire.chat import AnswerMessage, ChatRequest, Message

_RESERVED = ("messages", "tools", "add_generation_prompt")  # variables of the template that are the server's
_TAIL = 256  # characters


@dataclass(frozen=True)
class ChatPrompt:
    """`tail` is the end of the text, which may be inside a block of reasoning; the rest is for `keep`."""

    token_ids: list[int]
    tail: str
    key: bytes = b""
    turn: Turn | None = None  # that the prompt continues


class ChatPrompts:
    """Makes prompts of chats. With a store, those of unchanged history stay the same, token for token."""

    def __init__(self, store: TurnStore | None = None):
        self._store = store

    def make(
        self, engine: Engine, request: ChatRequest, owner: Sequence[str] = (), *, is_counted: bool = False
    ) -> ChatPrompt:
        """Raises InvalidParameter, ContextTooLong, or BadRequest in the words of the template.

        owner: model and principal; nobody continues another's turns. is_counted: the prompt is only to be
        counted, and may be longer than the context by some way.
        """
        tokenizer = require_tokenizer(engine, "messages")
        if engine.chat_template is None:
            message = f"the file of model '{request.model}' has no chat template; use /v1/completions"
            raise InvalidParameter(message, param="messages")
        variables = template_variables(engine.chat_template, request)
        messages = [_template_message(index, message) for index, message in enumerate(request.messages)]
        tools = [msgspec.to_builtins(tool) for tool in request.offered_tools]
        most = MOST_COUNTED * engine.max_context if is_counted else engine.max_context
        key = b""
        if self._store is not None:
            keys = conversation_keys([*owner, tools, variables], request.messages)
            key = keys[-1]
            if found := self._continued(engine, request, messages, tools, variables, keys):
                return found
        text = engine.chat_template.render(messages, tools=tools, **variables)
        check_length(engine, tokenizer.least_tokens(text), most, "messages", "at least ")
        token_ids = tokenizer.encode(text, add_special=False)
        if not is_counted:
            fitting(engine, token_ids, "messages")
        return ChatPrompt(token_ids, text[-_TAIL:], key)

    def keep(self, prompt: ChatPrompt, answer: AnswerMessage, token_ids: Sequence[int]) -> None:
        """Remembers that `prompt` was answered by `token_ids`, which a client knows as `answer`."""
        if self._store is not None:
            known = 0 if prompt.turn is None else prompt.turn.num_tokens
            own = [*prompt.token_ids[known:], *token_ids]
            self._store.keep(next_key(prompt.key, answer), prompt.turn, own)

    def _continued(
        self,
        engine: Engine,
        request: ChatRequest,
        messages: list[dict[str, Any]],
        tools: list[Any],
        variables: dict[str, Any],
        keys: list[bytes],
    ) -> ChatPrompt | None:
        """The prompt from the longest kept turn on; None if there is none, or none that fits."""
        assert self._store is not None
        assert engine.chat_template is not None
        assert engine.tokenizer is not None
        places = [index for index, message in enumerate(request.messages) if message.role == "assistant"]
        turn = self._store.find(keys[index] for index in reversed(places))
        if turn is None:
            return None
        index = keys.index(turn.key)
        mark = f"turn{uuid.uuid4().hex}"
        shown = [*messages[:index], {"role": "assistant", "content": mark}, *messages[index + 1 :]]
        try:
            text = engine.chat_template.render(shown, tools=tools, **variables)
        except BadRequest:
            return None
        if text.count(mark) != 1:
            return None
        rest = text.partition(mark)[2]
        if turn.num_tokens + engine.tokenizer.least_tokens(rest) >= engine.max_context:
            return None
        token_ids = turn.token_ids + engine.tokenizer.encode(rest, add_special=False)
        if len(token_ids) >= engine.max_context:
            return None
        return ChatPrompt(token_ids, rest[-_TAIL:], keys[-1], turn)


def template_variables(template: ChatTemplate, request: ChatRequest) -> dict[str, Any]:
    """The request's variables for the template, and its wishes for reasoning if the template knows those."""
    variables = dict(request.chat_template_kwargs or {})
    for name in _RESERVED:
        if name in variables:
            param = f"chat_template_kwargs.{name}"
            raise InvalidParameter(f"'{param}' is set by the server; leave it out", param=param)
    is_wanted = request.wants_reasoning
    if is_wanted is not None and "enable_thinking" in template.source:
        variables["enable_thinking"] = is_wanted
    if request.reasoning_effort is not None and "reasoning_effort" in template.source:
        variables.setdefault("reasoning_effort", request.reasoning_effort)
    return variables


def _template_message(index: int, message: Message) -> dict[str, Any]:
    """A message as it came; bringing it into the form that templates expect is the template's business."""
    if message.content is None and not message.tool_calls and message.role != "assistant":
        param = f"messages[{index}].content"
        raise InvalidParameter(f"'{param}' is missing; expected text", param=param)
    plain: dict[str, Any] = msgspec.to_builtins(message)
    return plain
