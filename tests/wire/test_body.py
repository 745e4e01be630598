"""Every wrong body is an error that names the field, shows the value and says what was expected."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.errors import BadRequest, InvalidParameter, MalformedJson, MissingModel
from helexa.wire.body import decode
from helexa.wire.chat import ChatRequest, parse_chat
from helexa.wire.completions import parse_completion

MESSAGES = [{"role": "user", "content": "x"}]


def chat(**fields: object) -> ChatRequest:
    return parse_chat(json.dumps({"model": "m", "messages": MESSAGES} | fields).encode())


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"temperature": "hot"},
            "temperature",
            "'temperature' is \"hot\"; expected number or null, got string",
        ),
        ({"temperature": 2.5}, "temperature", "'temperature' is 2.5; expected number <= 2.0"),
        ({"n": 0}, "n", "'n' is 0; expected integer >= 1"),
        ({"max_tokens": 1.5}, "max_tokens", "'max_tokens' is 1.5; expected integer or null, got number"),
        ({"seed": 2**70}, "seed", f"'seed' is {2**70}; expected integer <= 9223372036854775807"),
        ({"messages": []}, "messages", "'messages' is []; expected array of length >= 1"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing required field 'messages[0].role'"),
        (
            {"messages": [{"role": "king"}]},
            "messages[0].role",
            '\'messages[0].role\' is "king"; expected "assistant", "developer", "system", "tool" or "user"',
        ),
        (
            {"messages": [{"role": "assistant", "function_call": {"name": "f"}}]},
            "messages[0].function_call",
            "use 'tool_calls'",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "audio": {"id": "a"}}]},
            "messages[0].audio",
            "only text",
        ),
        (
            {"response_format": {"type": "xml"}},
            "response_format.type",
            'expected "grammar", "json_object", "json_schema", "regex" or "text"',
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"type": "x", "function": {"name": "f"}}]}]},
            "messages[0].tool_calls[0].type",
            '"x"; expected "function"',
        ),
        (
            {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
            "messages[0].content[0].type",
            "missing",
        ),
        ({"temprature": 1}, "temprature", "unknown field 'temprature'; did you mean 'temperature'?"),
        ({"zzzzz": 1}, "zzzzz", "unknown field 'zzzzz'"),
        ({"stream_options": {"usage": 1}, "stream": True}, "stream_options.usage", "unknown field"),
        ({"stream_options": {}}, "stream_options", "only allowed with 'stream'"),
        ({"top_logprobs": 2}, "top_logprobs", "only allowed with 'logprobs'"),
        (
            {"top_logprobs": 21, "logprobs": True},
            "top_logprobs",
            "'top_logprobs' is 21; expected integer <= 20",
        ),
        ({"stop": ["a", ""]}, "stop", "empty string"),
        ({"stop": ["x"] * 17}, "stop", "17 strings; at most 16"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "has the key 'a'; expected a token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "expected number <= 100.0"),
        ({"metadata": "x" * 500}, "metadata", "…; expected"),
    ],
)
def test_the_message_names_field_value_and_expectation(fields, param, message):
    with pytest.raises(InvalidParameter) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert message in caught.value.message
    assert len(caught.value.message) < 250


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"a": NaN}', b"\xff", b'{"model": "\xff"}', b'{"model": "m"} x', b"[" * 100_000]
)
def test_what_is_no_json_is_malformed_or_no_object(body):
    with pytest.raises(BadRequest) as caught:
        parse_chat(body)
    assert isinstance(caught.value, MalformedJson | InvalidParameter)


@pytest.mark.parametrize("body", [{"messages": MESSAGES}, {"model": "", "messages": MESSAGES}])
def test_a_request_without_a_model_says_so(body):
    with pytest.raises(MissingModel):
        parse_chat(json.dumps(body).encode())


def test_half_characters_become_replacement_characters():
    body = b'{"model": "m", "messages": [{"role": "user", "content": "\\ud83d x \\ud83d\\ude00"}]}'
    assert parse_chat(body).messages[0].content == "\ufffd x \U0001f600"


def test_null_is_not_given():
    request = chat(temperature=None, stop=None, n=None, stream=None, stream_options=None, tools=None)
    assert (request.num_choices, request.stops, request.include_usage) == (1, (), False)


def test_members_that_clients_echo_in_messages_are_ignored():
    echoed = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None}
    assert chat(messages=[echoed]).messages[0].content is None


def test_max_completion_tokens_wins():
    assert chat(max_tokens=5, max_completion_tokens=3).token_limit == 3
    assert chat(max_tokens=5).token_limit == 5
    assert chat().token_limit is None


def test_logprobs_count_alternatives_only_when_asked():
    assert chat(top_logprobs=None).num_logprobs is None
    assert chat(logprobs=True).num_logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).num_logprobs == 4


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_come_in_four_kinds(prompt, prompts):
    assert parse_completion(json.dumps({"model": "m", "prompt": prompt}).encode()).prompts == prompts


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[-1]]}, "prompt[0][0]"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 2}, "n"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"messages": []}, "messages"),
    ],
)
def test_completions_refuse_by_name(fields, param):
    with pytest.raises(InvalidParameter) as caught:
        parse_completion(json.dumps({"model": "m", "prompt": "a"} | fields).encode())
    assert caught.value.param == param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
NAMES = st.sampled_from([*ChatRequest.__struct_fields__, "prompt", "role", "content"])


@given(fields=st.dictionaries(NAMES, JSON, max_size=4), parse=st.sampled_from([parse_chat, parse_completion]))
def test_any_fields_are_read_or_refused(fields, parse):
    with suppress(BadRequest):
        parse(json.dumps({"model": "m", "messages": MESSAGES, "prompt": "x"} | fields).encode())


@given(body=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(body):
    with pytest.raises(BadRequest):
        decode(body, ChatRequest)


@pytest.mark.parametrize("rest", [b"Infinity", b'"\\x"', b"[1,", b"[" * 200_000])
def test_a_wrong_value_before_what_is_no_json_is_no_json(rest):
    with pytest.raises(MalformedJson):
        parse_chat(b'{"model": null, "messages": ' + rest + b"}")


def test_a_wrong_value_before_half_a_character_is_named():
    with pytest.raises(InvalidParameter) as caught:
        parse_chat(b'{"model": 5, "messages": [{"role": "user", "content": "\\ud83d"}]}')
    assert caught.value.param == "model"
