"""What the engine is asked for: sampling parameters, grammar and bounds of reasoning. Or a refusal."""

import json
from typing import Any

import msgspec

from helexa.engine.engine import Engine
from helexa.engine.grammar import GrammarSpec
from helexa.engine.guide import Thinking
from helexa.engine.sampling_params import SamplingParams
from helexa.errors import InvalidParameter
from helexa.wire.chat import ChatRequest, ResponseFormat
from helexa.wire.completions import CompletionRequest

_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip
# Shares of an answer's tokens that reasoning may take. What is left over is for the answer itself.
_EFFORT_SHARES = {"minimal": 0.1, "low": 0.2, "medium": 0.5, "high": 0.75, "xhigh": 0.85, "max": 0.95}
_DEFAULT_SHARE = 0.5
_MOST_SHARE = 0.95
_LEFT_TOKENS = 24  # for the end of the block and the beginning of the answer, however small the limit


def refuse_unsupported(request: ChatRequest) -> None:
    """Raises InvalidParameter for the first field that asks for what no model here does."""
    for name, is_asked, instead in (
        ("functions", bool(request.functions), "use 'tools'"),
        ("function_call", request.function_call not in (None, "none", "auto"), "use 'tool_choice'"),
        ("verbosity", request.verbosity not in (None, "medium"), "use 'medium' or leave it out"),
        ("modalities", request.modalities not in (None, [], ["text"]), "use ['text'] or leave it out"),
        ("audio", request.audio is not None, "leave it out"),
        ("web_search_options", request.web_search_options is not None, "leave it out"),
        ("store", bool(request.store), "use false or leave it out"),
    ):
        if is_asked:
            raise InvalidParameter(f"'{name}' is not supported here; {instead}", param=name)


def sampling_params(
    request: ChatRequest | CompletionRequest,
    choice: int,
    *,
    grammar: GrammarSpec | None = None,
    thinking: Thinking | None = None,
) -> SamplingParams:
    """The parameters of one choice; with a seed, each choice of a request has one of its own."""
    return SamplingParams(
        **{name: getattr(request, name) for name in _FIELDS},
        logit_bias=request.token_bias,
        seed=None if request.seed is None else request.seed + choice,
        logprobs=request.num_logprobs,
        stop=request.stops,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        max_tokens=request.token_limit,
        ignore_eos=bool(request.ignore_eos),
        grammar=grammar,
        thinking=thinking,
    )


def grammar_of(engine: Engine, request: ChatRequest) -> GrammarSpec | None:
    """What the answer must follow: its format, or a tool call. Raises InvalidParameter for what cannot be."""
    wanted = _format_grammar(request.response_format)
    if not request.offered_tools:
        return wanted
    tool_format = engine.output_format
    if tool_format.tool_calls is None:
        raise InvalidParameter(
            f"'tools' cannot be used with model '{request.model}': its chat template knows no tool calls, or "
            "none of a format that can be read",
            param="tools",
        )
    if request.forced_tool is None and wanted is None:
        return None
    schema = None
    if request.forced_tool is None and wanted is not None:
        schema = _schema_beside_tools(wanted)
    kind, source = tool_format.tool_grammar(
        [msgspec.to_builtins(tool) for tool in request.offered_tools],
        choice=request.forced_tool or "auto",
        parallel=request.parallel_tool_calls is not False,
        response_schema=schema,
    )
    return GrammarSpec(kind, source, "tools" if request.forced_tool else "response_format")


def _schema_beside_tools(wanted: GrammarSpec) -> dict[str, Any]:
    """What an answer must be that is no call."""
    if wanted.kind == "json_object":
        return {"type": "object"}
    if wanted.kind == "json_schema":
        schema: dict[str, Any] = json.loads(wanted.source)
        return schema
    message = "'response_format' of this type is not supported together with tools that may be called"
    raise InvalidParameter(f"{message}; leave either out", param="response_format")


def _format_grammar(wanted: ResponseFormat | None) -> GrammarSpec | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return GrammarSpec("json_object")
    if wanted.type == "json_schema":
        schema = (wanted.json_schema or {}).get("schema")
        if not isinstance(schema, dict):
            param = "response_format.json_schema.schema"
            raise InvalidParameter(f"'{param}' is {schema!r:.80}; expected a JSON schema", param=param)
        return GrammarSpec("json_schema", json.dumps(schema, ensure_ascii=False))
    source = wanted.regex if wanted.type == "regex" else wanted.grammar
    if not source:
        param = f"response_format.{wanted.type}"
        raise InvalidParameter(f"'{param}' is missing; expected the text of it", param=param)
    return GrammarSpec("regex" if wanted.type == "regex" else "lark", source)


def thinking_of(
    engine: Engine, request: ChatRequest, is_open: bool, num_prompt_tokens: int
) -> Thinking | None:
    """The block of reasoning that the model may write, and how long; None for a model that has none.

    It is always bounded, so that there are tokens left for the answer.
    """
    markers = engine.output_format.reasoning
    if markers is None:
        return None
    room = engine.max_context - num_prompt_tokens
    limit = min(request.token_limit or room, room)
    if request.wants_reasoning is False:
        budget = 0
    elif request.thinking_budget is not None:
        budget = min(request.thinking_budget, int(limit * _MOST_SHARE))
    else:
        budget = int(limit * _EFFORT_SHARES.get(request.reasoning_effort or "", _DEFAULT_SHARE))
    budget = max(0, min(budget, limit - _LEFT_TOKENS))
    return Thinking(is_open, markers.start, markers.end, budget, f"\n{markers.end}\n\n")
