"""Grammars that have a model call tools: what they admit is what the parser reads, and nothing else."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa.engine.grammar import GrammarCompiler, GrammarSpec
from helexa.engine.output import OutputFormat
from helexa.engine.tokenizer import Tokenizer
from helexa.errors import InvalidParameter
from helexa.weights.pre_tokenizers import PRE_TOKENIZERS
from support.model_output import TOOLS, function, loaded, read

_FORMATS = ("hermes", "qwen_xml")
_END = 256
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def _byte_compiler():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    tokens = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    return GrammarCompiler(
        Tokenizer([*tokens, "<|end|>"], [1] * 256 + [3], [], PRE_TOKENIZERS["gpt-2"], ends=[_END])
    )


_COMPILER = _byte_compiler()


def _grammar(tool_calls, tools=TOOLS, **options):
    return GrammarSpec(*OutputFormat(None, tool_calls).tool_grammar(tools, **options))


def _admits(spec, text):
    """Whether `text` is a whole answer by the grammar."""
    matcher = _COMPILER.compile(spec)
    for byte in text.encode():
        if not matcher.allowed()[byte]:
            return False
        matcher.consume(byte)
    return matcher.is_complete or bool(matcher.allowed()[_END])


def _hermes(name, arguments):
    text = json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>'


def _xml(name, arguments):
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    inner = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


_WRITTEN = {"hermes": _hermes, "qwen_xml": _xml}
_OSLO = ("get_weather", {"city": "Oslo", "days": 3})
_NOW = ("now", {})
_BOTH = pytest.mark.parametrize("tool_calls", _FORMATS)


@_BOTH
def test_required_calls_come_without_text_before_them(tool_calls):
    spec, written = _grammar(tool_calls), _WRITTEN[tool_calls]
    assert _admits(spec, written(*_OSLO))
    assert _admits(spec, "\n\n" + written(*_OSLO))
    assert _admits(spec, f"{written(*_OSLO)}\n{written(*_NOW)}\n{written(*_OSLO)}")
    for text in ("", "\n\n", "Hello", "Hello\n" + written(*_OSLO), written(*_OSLO) + "\nDone."):
        assert not _admits(spec, text)


@_BOTH
def test_one_call_is_all_where_calls_are_not_parallel(tool_calls):
    spec, written = _grammar(tool_calls, parallel=False), _WRITTEN[tool_calls]
    assert _admits(spec, written(*_OSLO))
    assert not _admits(spec, f"{written(*_OSLO)}\n{written(*_NOW)}")


@_BOTH
def test_a_named_tool_is_the_only_one(tool_calls):
    spec, written = _grammar(tool_calls, choice="now"), _WRITTEN[tool_calls]
    assert _admits(spec, written(*_NOW))
    assert not _admits(spec, written(*_OSLO))


@_BOTH
def test_calls_or_an_answer_of_the_schema(tool_calls):
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["a"]}
    schema = {**schema, "$defs": {"n": {"type": "integer"}}, "additionalProperties": False}
    spec = _grammar(tool_calls, choice="auto", response_schema=schema)
    assert _admits(spec, _WRITTEN[tool_calls](*_OSLO))
    assert _admits(spec, '{"a": 3}')
    assert _admits(spec, '\n\n{\n  "a": 3\n}')
    for text in ("Hello", '{"a": "b"}', "{}", '{"a": 3} ' + _WRITTEN[tool_calls](*_NOW)):
        assert not _admits(spec, text)


@_BOTH
def test_arguments_follow_the_schema(tool_calls):
    spec, written = _grammar(tool_calls), _WRITTEN[tool_calls]
    for arguments in ({"days": 3}, {"city": "Oslo", "days": "three"}, {"city": "Oslo", "days": 3.5}):
        assert not _admits(spec, written("get_weather", arguments))
    for arguments in ({"points": [1, 2.5]}, {"is_log": True, "options": {"a": [1]}}, {"scale": 1e-3}):
        assert _admits(spec, written("plot", arguments))
    assert not _admits(spec, written("plot", {"is_log": 1}))
    assert not _admits(spec, written("now", {"zone": "UTC"}))
    assert not _admits(spec, written("fly", {}))


@_BOTH
def test_values_of_an_enumeration_are_the_only_ones(tool_calls):
    tool = function("turn", {"to": {"type": "string", "enum": ["left", 'the "right"']}}, ["to"])
    spec, written = _grammar(tool_calls, [tool]), _WRITTEN[tool_calls]
    assert _admits(spec, written("turn", {"to": "left"}))
    assert _admits(spec, written("turn", {"to": 'the "right"'}))
    assert not _admits(spec, written("turn", {"to": "up"}))


@_BOTH
def test_a_tool_may_declare_little(tool_calls):
    bare = {"type": "function", "function": {"name": "go"}}
    untyped = {"type": "function", "function": {"name": "look", "parameters": {}}}
    open_ended = function("put", additionalProperties={"type": "string"})
    spec, written = _grammar(tool_calls, [bare, untyped, open_ended]), _WRITTEN[tool_calls]
    assert _admits(spec, written("go", {}))
    assert _admits(spec, written("look", {}))
    assert _admits(spec, written("put", {"a_b": "x", "c": "y"}))


@_BOTH
def test_a_schema_that_requires_what_it_does_not_declare_is_no_obstacle(tool_calls):
    spec = _grammar(tool_calls, [function("f", {"a": {"type": "string"}}, ["a", "b"])])
    assert _admits(
        spec, _WRITTEN[tool_calls]("f", {"a": "x", "b": 1} if tool_calls == "hermes" else {"a": "x"})
    )


@_BOTH
def test_references_to_definitions_are_followed(tool_calls):
    step = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    tool = function(
        "walk",
        {"steps": {"type": "array", "items": {"$ref": "#/$defs/step"}}},
        ["steps"],
        **{"$defs": {"step": step}},
    )
    spec, written = _grammar(tool_calls, [tool]), _WRITTEN[tool_calls]
    assert _admits(spec, written("walk", {"steps": [{"n": 1}]}))
    assert not _admits(spec, written("walk", {"steps": [1]}))


@_BOTH
def test_names_may_have_any_characters(tool_calls):
    name, arguments = "mcp__a-b.c/d e", {"x-y 'z' \\": "1"}
    tool = function(name, {key: {"type": "string"} for key in arguments})
    text = _WRITTEN[tool_calls](name, arguments)
    assert _admits(_grammar(tool_calls, [tool]), text)
    found = read(OutputFormat(None, tool_calls).parser(tools=[tool]), [text])
    assert loaded(found) == [("call", name, arguments)]


@_BOTH
def test_keywords_that_grammars_do_not_know_are_left_out(tool_calls):
    tool = function(
        "open", {"at": {"type": "object", "format": "whatever", "x-order": 1, "contentEncoding": "base64"}}
    )
    assert _admits(_grammar(tool_calls, [tool]), _WRITTEN[tool_calls]("open", {"at": {"a": 1}}))


@_BOTH
def test_patterns_that_no_automaton_can_follow_are_left_out(tool_calls):
    items = {"type": "string", "pattern": r"^(?!x)\w+$"}
    tool = function("find", {"all": {"type": "array", "items": items, "patternProperties": {"(?=a)": {}}}})
    spec, written = _grammar(tool_calls, [tool]), _WRITTEN[tool_calls]
    assert _admits(spec, written("find", {"all": ["a", "x"]}))
    assert not _admits(spec, written("find", {"all": [1]}))


@pytest.mark.parametrize(
    "schema", [{"$ref": "#/nowhere"}, {"type": "strng"}, {"type": "string", "pattern": "("}]
)
def test_a_schema_that_is_wrong_is_refused_in_words(schema):
    tool = function("find", {"what": schema})
    with pytest.raises(InvalidParameter, match="refused"):
        _COMPILER.compile(_grammar("hermes", [tool]))


def test_a_tool_that_is_not_offered_is_refused():
    with pytest.raises(
        InvalidParameter, match="asks for 'fly'; the tools of the request are: get_weather, "
    ) as caught:
        _grammar("hermes", choice="fly")
    assert caught.value.param == "tool_choice"


# What a grammar admits is what the parser reads

_TEXT = st.text(
    st.characters(codec="utf-8", exclude_characters="\x7f")
)  # which grammars do not admit in JSON
_ORDER = ("city", "days", "path", "content")  # of declaration, which grammars keep
_ARGUMENTS = {
    "get_weather": st.fixed_dictionaries({"city": _TEXT}, optional={"days": st.integers()}),
    "write_file": st.fixed_dictionaries({"path": _TEXT, "content": _TEXT}),
    "now": st.just({}),
}
_CALLS = st.sampled_from(sorted(_ARGUMENTS)).flatmap(lambda name: st.tuples(st.just(name), _ARGUMENTS[name]))


@_BOTH
@settings(max_examples=50, deadline=None)
@given(calls=st.lists(_CALLS, min_size=1, max_size=3))
def test_calls_that_a_grammar_admits_are_read_as_they_are_meant(tool_calls, calls):
    calls = [(name, {key: given[key] for key in _ORDER if key in given}) for name, given in calls]
    text = "\n".join(_WRITTEN[tool_calls](*call) for call in calls)
    assert _admits(_grammar(tool_calls), text)
    found = read(OutputFormat(None, tool_calls).parser(tools=TOOLS), [text])
    assert loaded(found) == [("call", name, arguments) for name, arguments in calls]


def _walk(spec, choose):
    """A text that the grammar admits, chosen at random but for a wish to come to an end."""
    matcher, text = _COMPILER.compile(spec), b""
    ending = b""
    while not matcher.is_complete and len(text) < 4000:
        allowed = matcher.allowed()
        if allowed[_END]:
            break
        if not ending or not allowed[ending[0]]:
            ending = b"\n</parameter>" if choose.random() < 0.2 else b""
        if ending and allowed[ending[0]]:
            byte, ending = ending[0], ending[1:]
        else:
            wished = [code for code in b'"}],:<\n ' if allowed[code]]
            plain = [code for code in (_LETTERS + "<>/{}[]-. ").encode() if allowed[code]]
            options = wished if wished and (choose.random() < 0.6 or not plain) else plain
            byte = choose.choice(options or np.flatnonzero(allowed[:_END]).tolist())
        matcher.consume(byte)
        text += bytes([byte])
    return text.decode("utf-8", "replace"), matcher.is_complete or bool(matcher.allowed()[_END])


@_BOTH
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_whatever_a_grammar_has_a_model_write_is_a_call(tool_calls, seed):
    text, is_whole = _walk(_grammar(tool_calls, parallel=False), random.Random(seed))
    found = read(OutputFormat(None, tool_calls).parser(tools=TOOLS), text, truncated=not is_whole)
    if not is_whole:
        return
    ((kind, name, arguments),) = loaded(found)
    assert kind == "call"
    parameters = next(tool["function"]["parameters"] for tool in TOOLS if tool["function"]["name"] == name)
    assert set(parameters["required"]) <= set(arguments) <= set(parameters["properties"])
    for key, kinds in (("days", int), ("points", list), ("is_log", bool), ("options", dict)):
        assert key not in arguments or isinstance(arguments[key], kinds)
