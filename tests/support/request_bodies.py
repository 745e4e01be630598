"""Bodies of requests as Hypothesis makes them from the types of the wire: any that fit, and nearly so."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from hypothesis import strategies as st

from helexa.gateway import admin
from helexa.wire import control
from helexa.wire.anthropic import MessagesRequest
from helexa.wire.chat import EFFORTS, ChatRequest
from helexa.wire.completions import CompletionRequest
from helexa.wire.embeddings import EmbeddingRequest
from helexa.wire.responses import ResponsesRequest
from helexa.wire.tokenize import DetokenizeRequest, TokenizeRequest

MODEL = "m"
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
WORDS = st.text(max_size=12)
ITEMS = st.sampled_from(
    [
        {"role": "user", "content": "hi"},
        {"role": "developer", "content": [{"type": "input_text", "text": "be brief"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "so"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
        {"type": "custom_tool_call", "call_id": "d", "name": "g", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "d", "output": [{"type": "input_text", "text": ""}]},
        {"type": "reasoning", "content": None, "encrypted_content": "x", "summary": []},
        {"type": "item_reference", "id": "msg_1"},
        {"type": "tool_search_output", "call_id": "c", "tools": [{"type": "function", "name": "h"}]},
    ]
)
HOSTED = st.sampled_from(
    [
        {"type": "function", **FUNCTION},
        {"type": "custom", "name": "g"},
        {"type": "namespace", "name": "s", "tools": [{"type": "function", **FUNCTION}]},
        {"type": "web_search"},
        {"type": "tool_search", "execution": "client"},
    ]
)
FEW, COUNT = st.integers(1, 6), st.integers(1, 3)
# What the types leave open and the servers do not: values that get a request beyond its first check.
TELLING: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from([MODEL] * 9 + ["gone"]),
    "max_tokens": FEW,
    "max_completion_tokens": FEW,
    "max_output_tokens": FEW,
    "n": COUNT,
    "best_of": COUNT,
    "reasoning_effort": st.sampled_from(EFFORTS),
    "Reasoning.effort": st.sampled_from(EFFORTS),
    "ContentPart.type": st.sampled_from(["text", "text", "refusal", "image_url"]),
    "ChatRequest.tools": st.lists(st.just(TOOL), min_size=1, max_size=1),
    "tool_choice": st.sampled_from(["none", "auto", "required", TOOL]),
    "logit_bias": st.dictionaries(st.integers(0, 300).map(str), st.floats(-100, 100), max_size=2),
    "Block.type": st.sampled_from(
        ["text", "thinking", "tool_use", "tool_result", "document", "image", "search_result", "other"]
    ),
    "Source.type": st.sampled_from(["text", "content", "url", "base64"]),
    "MessagesRequest.tools": st.lists(
        st.just({"name": "f", "input_schema": {"type": "object"}}), min_size=1, max_size=1
    ),
    "ToolChoice.type": st.sampled_from(["auto", "any", "none"]),
    "ResponsesRequest.input": WORDS | st.lists(ITEMS, max_size=4),
    "ResponsesRequest.tools": st.lists(HOSTED, max_size=2),
    "previous_response_id": st.just("resp_1"),
    "model_id": st.sampled_from(
        ["other", "absent", "", " ", MODEL]
    ),  # none that requests are made to but one
    "node": st.sampled_from(["n0", "n1"]),
    "source": st.sampled_from(["here", "nowhere"]),
    "drain_s": st.sampled_from([0, 0.1]),
    "wait": st.just(True),
    "device": st.just("cpu"),
}
NEURON: dict[str, Any] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/models/load": control.LoadRequest,
    "/models/unload": control.UnloadRequest,
    "/defrag": None,
}
GATEWAY: dict[str, Any] = {
    **{path: kind for path, kind in NEURON.items() if path != "/defrag"},
    "/models/load": admin._Load,
    "/models/unload": admin._Unload,
    "/v1/responses": ResponsesRequest,
    "/v1/responses/input_tokens": ResponsesRequest,
    "/v1/responses/{id}/cancel": None,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": MessagesRequest,
    "/reload": None,
}
LIMITS = {"max_tokens", "max_output_tokens"}  # always given, that answers end soon


def values(info: msgspec.inspect.Type, name: str = "") -> st.SearchStrategy[Any]:
    """What fits a type of the wire; `name` is that of its field, Type.field."""
    for known in (name, name.partition(".")[2]):
        if known in TELLING:
            is_optional = isinstance(info, msgspec.inspect.UnionType) and info.includes_none
            return TELLING[known] | st.none() if is_optional else TELLING[known]
    return FITTING.get(type(info), lambda _: JSON)(info)


def numbers(info: Any) -> st.SearchStrategy[float]:
    low, is_open = (info.ge, False) if info.gt is None else (info.gt, True)
    return st.floats(low, info.le, exclude_min=is_open, allow_nan=False, allow_infinity=False)


FITTING: dict[type, Callable[[Any], st.SearchStrategy[Any]]] = {
    msgspec.inspect.StructType: lambda info: st.deferred(lambda: bodies(info.cls)),
    msgspec.inspect.UnionType: lambda info: st.one_of([values(inner) for inner in info.types]),
    msgspec.inspect.LiteralType: lambda info: st.sampled_from(info.values),
    msgspec.inspect.ListType: lambda info: st.lists(
        values(info.item_type), min_size=info.min_length or 0, max_size=3
    ),
    msgspec.inspect.DictType: lambda info: st.dictionaries(WORDS, values(info.value_type), max_size=3),
    msgspec.inspect.IntType: lambda info: st.integers(
        -(2**70) if info.ge is None else info.ge, info.le or 2**70
    ),
    msgspec.inspect.FloatType: numbers,
    msgspec.inspect.StrType: lambda _: WORDS,
    msgspec.inspect.BoolType: lambda _: st.booleans(),
    msgspec.inspect.NoneType: lambda _: st.none(),
}


def bodies(kind: type[msgspec.Struct]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with all fields that a type requires and some of the others."""
    known = {
        field.encode_name: (field, values(field.type, f"{kind.__name__}.{field.name}"))
        for field in msgspec.inspect.type_info(kind).fields  # type: ignore[attr-defined]
    }
    always = {name: value for name, (field, value) in known.items() if field.required or name in LIMITS}
    others = [name for name in known if name not in always]
    some = st.lists(st.sampled_from(others), max_size=4, unique=True) if others else st.just([])
    return some.flatmap(
        lambda names: st.fixed_dictionaries({**always, **{name: known[name][1] for name in names}})
    )


MARK = "\x00mark"
# JSON, or nearly, in place of a value.
ODD = st.sampled_from(
    [
        *("null", "true", "-1", "0", "1e400", "NaN", "-Infinity", "9" * 400, "0.1e-400", '""', "[]", "{}"),
        *('"\\ud800"', '"\\udc00\\ud800 x"', '"\\u0000"', '"' + "x" * 70_000 + '"', "[" * 3000 + "]" * 3000),
        *('{"a":' * 1500 + "1" + "}" * 1500, '[{"type":[]}]', "[[null]]", '{"type":"text","text":{}}', "01"),
        *("'a'", '"\n"', '"\\x"', "", "[1,]", '{"a":1,"a":2}', '"\ufffe"', "undefined"),
    ]
)


@st.composite
def mutated(draw: Any, kind: type[msgspec.Struct]) -> bytes:
    """A body that fits, with one thing wrong."""
    body = draw(bodies(kind))
    how = draw(st.sampled_from(["value"] * 8 + ["extra", "twice", "short", "bytes", "whole", "behind"]))
    if how == "value":
        parent, key = draw(st.sampled_from(list(places(body))))
        parent[key] = MARK
        return json.dumps(body).replace(json.dumps(MARK), draw(ODD)).encode()
    if how == "extra":
        parent, _ = draw(st.sampled_from(list(places(body))))
        if isinstance(parent, dict):
            parent[draw(st.text(max_size=5))] = draw(JSON)
    raw = json.dumps(body).encode()
    if how == "twice":
        return b'{"model": 1, ' + raw[1:]
    if how == "short":
        return raw[: draw(st.integers(0, len(raw) - 1))]
    if how == "bytes":
        at = draw(st.integers(0, len(raw)))
        return raw[:at] + draw(st.binary(min_size=1, max_size=3)) + raw[at:]
    if how == "whole":
        return str(draw(ODD)).encode()
    return raw + (b"" if how == "extra" else b" {}")


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a value within: what it is in, and its key or index."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in list(inner):
        yield value, key
        yield from places(member)
