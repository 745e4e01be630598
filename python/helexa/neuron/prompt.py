"""A request of the wire as the engine takes it: token ids and sampling parameters. Or a refusal."""

from typing import Any

import msgspec

from helexa.engine.engine import Engine
from helexa.engine.sampling_params import SamplingParams
from helexa.engine.tokenizer import Tokenizer
from helexa.errors import ContextTooLong, InvalidParameter
from helexa.wire.chat import ChatRequest, Message
from helexa.wire.completions import CompletionRequest, Prompt

_SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip
_MOST_COUNTED = 4  # contexts; a prompt may be counted up to there, at 150 bytes of memory a character
_RESERVED = (
    "messages",
    "tools",
    "add_generation_prompt",
)  # arguments of the template that are not the client's


def refuse_unsupported(request: ChatRequest) -> None:
    """Raises InvalidParameter for the first field that asks for what this neuron does not do."""
    for name, is_asked, instead in (
        ("tools", bool(request.tools), "leave it out"),
        ("tool_choice", request.tool_choice not in (None, "none", "auto"), "use 'none' or leave it out"),
        ("functions", bool(request.functions), "leave it out"),
        ("function_call", request.function_call not in (None, "none", "auto"), "leave it out"),
        (
            "response_format",
            request.response_format is not None and request.response_format.type != "text",
            "use {'type': 'text'} or leave it out",
        ),
        ("reasoning_effort", request.reasoning_effort is not None, "leave it out"),
        ("verbosity", request.verbosity not in (None, "medium"), "use 'medium' or leave it out"),
        ("modalities", request.modalities not in (None, [], ["text"]), "use ['text'] or leave it out"),
        ("audio", request.audio is not None, "leave it out"),
        ("web_search_options", request.web_search_options is not None, "leave it out"),
        ("store", bool(request.store), "use false or leave it out"),
    ):
        if is_asked:
            raise InvalidParameter(f"'{name}' is not supported here; {instead}", param=name)


def chat_token_ids(engine: Engine, request: ChatRequest, *, is_counted: bool = False) -> list[int]:
    """The prompt that the model's own template makes of the messages; InvalidParameter or ContextTooLong.

    is_counted: it is only to be counted, and may be longer than the context by some way.
    """
    tokenizer = require_tokenizer(engine, "messages")
    if engine.chat_template is None:
        message = f"the file of model '{request.model}' has no chat template; use /v1/completions"
        raise InvalidParameter(message, param="messages")
    keywords = request.chat_template_kwargs or {}
    for name in _RESERVED:
        if name in keywords:
            param = f"chat_template_kwargs.{name}"
            raise InvalidParameter(f"'{param}' is set by the server; leave it out", param=param)
    messages = [_template_message(index, message) for index, message in enumerate(request.messages)]
    text = engine.chat_template.render(messages, add_generation_prompt=True, **keywords)
    most = _MOST_COUNTED * engine.max_context if is_counted else engine.max_context
    _check_length(engine, tokenizer.least_tokens(text), most, "messages", "at least ")
    token_ids = tokenizer.encode(text, add_special=False)
    return token_ids if is_counted else _fitting(engine, token_ids, "messages")


def completion_token_ids(engine: Engine, prompt: Prompt) -> list[int]:
    """A text prompt tokenized as it stands, or token ids checked against the vocabulary."""
    tokenizer = require_tokenizer(engine, "prompt")
    if isinstance(prompt, str):
        _check_length(engine, tokenizer.least_tokens(prompt), engine.max_context, "prompt", "at least ")
        return _fitting(engine, tokenizer.encode(prompt, add_special=True), "prompt")
    check_token_ids(engine, prompt, "prompt")
    return _fitting(engine, prompt, "prompt")


def counted_token_ids(engine: Engine, prompt: str, add_special: bool) -> list[int]:
    """A text tokenized to be counted, which may be longer than the context by some way."""
    tokenizer = require_tokenizer(engine, "prompt")
    most = _MOST_COUNTED * engine.max_context
    _check_length(engine, tokenizer.least_tokens(prompt), most, "prompt", "at least ")
    return tokenizer.encode(prompt, add_special=add_special)


def require_tokenizer(engine: Engine, param: str) -> Tokenizer:
    """The model's tokenizer. Raises InvalidParameter if its file has none."""
    if engine.tokenizer is None:
        raise InvalidParameter("the file of this model has no vocabulary", param=param)
    return engine.tokenizer


def check_token_ids(engine: Engine, token_ids: list[int], param: str) -> None:
    """Raises InvalidParameter for a token beyond the vocabulary."""
    size = engine.config.vocab_size
    if (highest := max(token_ids, default=0)) >= size:
        message = f"'{param}' has token {highest}; the model's vocabulary has {size} tokens"
        raise InvalidParameter(message, param=param)


def sampling_params(request: ChatRequest | CompletionRequest, choice: int) -> SamplingParams:
    """What the engine is asked for; with a seed, each choice of one request has one of its own."""
    return SamplingParams(
        **{name: getattr(request, name) for name in _SAMPLING_FIELDS},
        logit_bias=request.token_bias,
        seed=None if request.seed is None else request.seed + choice,
        logprobs=request.num_logprobs,
        stop=request.stops,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        max_tokens=request.token_limit,
        ignore_eos=bool(request.ignore_eos),
    )


def _fitting(engine: Engine, token_ids: list[int], param: str) -> list[int]:
    """`token_ids` if there is room for at least one token of answer after them."""
    if not token_ids:
        raise InvalidParameter(f"'{param}' makes no tokens; expected some text", param=param)
    _check_length(engine, len(token_ids), engine.max_context, param)
    return token_ids


def _check_length(engine: Engine, num_tokens: int, most: int, param: str, how: str = "") -> None:
    if num_tokens >= most:
        raise ContextTooLong(
            f"This model's maximum context length is {engine.max_context} tokens, but the {param} "
            f"came to {how}{num_tokens} tokens. Reduce the length of the {param}.",
            param=param,
            max=engine.max_context,
            prompt_tokens=num_tokens,
        )


def _template_message(index: int, message: Message) -> dict[str, Any]:
    """A message as it came; bringing it into the form that templates expect is the template's business."""
    if message.content is None and not message.tool_calls and message.role != "assistant":
        param = f"messages[{index}].content"
        raise InvalidParameter(f"'{param}' is missing; expected text", param=param)
    plain: dict[str, Any] = msgspec.to_builtins(message)
    return plain
