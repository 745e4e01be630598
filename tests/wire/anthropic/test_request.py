import json
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.errors import BadRequest, InvalidParameter, MalformedJson, MissingModel
from helexa.wire.anthropic import parse_messages
from helexa.wire.chat import parse_chat

TRANSCRIPTS = sorted((Path(__file__).parent.parent / "transcripts").glob("claude_*.json"))
HELLO = {"role": "user", "content": "Hello"}
TOOL = {"name": "look", "input_schema": {"type": "object"}}


def parse(*, is_beta=False, **more):
    body = {"model": "m", "max_tokens": 100, "messages": [HELLO], **more}
    return parse_messages(json.dumps(body).encode(), is_beta=is_beta)


def chat(**more):
    return json.loads(parse(**more).to_chat())


def messages(*turns, **more):
    return chat(messages=[{"role": role, "content": content} for role, content in turns], **more)["messages"]


def refusal(**more):
    with pytest.raises(InvalidParameter) as caught:
        parse(**more).to_chat()
    return caught.value


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_what_claude_code_sends_becomes_canonical_chat(path):
    transcript = json.loads(path.read_text())
    request = parse_messages(json.dumps(transcript["request"]).encode(), is_beta=transcript["is_beta"])
    body = request.to_chat()
    assert json.loads(body) == transcript["canonical"]
    parse_chat(body)  # the neuron takes it
    parse_chat(request.to_tokenize())


def test_the_billing_line_stays_where_that_is_wanted():
    line = "x-anthropic-billing-header: cc_version=2.1.197.3f1; cch=a81c7;"
    request = parse(system=[{"type": "text", "text": line}])
    assert json.loads(request.to_chat(normalize_billing=False))["messages"][0]["content"] == line
    assert json.loads(request.to_tokenize())["messages"][0]["content"] != line


def test_system_messages_before_the_first_turn_join_the_system_prompt():
    assert messages(("system", "two"), ("user", "Hi"), ("system", "three"), system="one") == [
        {"role": "system", "content": "one\n\ntwo"},
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": "three"},
    ]


def test_an_empty_system_prompt_is_none():
    for empty in ("", [], [{"type": "text", "text": ""}]):
        assert chat(system=empty)["messages"] == [HELLO]


def test_the_count_depends_on_the_prompt_alone():
    asked = {"tools": [TOOL], "thinking": {"type": "adaptive"}, "system": "s"}
    counted = json.loads(parse(**asked, max_tokens=None).to_tokenize())
    generated = chat(**asked, stream=True, temperature=1, stop_sequences=["x"])
    assert counted.items() <= generated.items()
    assert generated.keys() - counted == {"max_tokens", "stream", "stream_options", "temperature", "stop"}


@pytest.mark.parametrize(
    ("asked", "canonical"),
    [
        ({}, {"chat_template_kwargs": {"enable_thinking": False}, "thinking_budget": 0}),
        (
            {"thinking": {"type": "disabled"}, "output_config": {"effort": "max"}},
            {"chat_template_kwargs": {"enable_thinking": False}, "thinking_budget": 0},
        ),
        ({"thinking": {"type": "adaptive"}}, {"chat_template_kwargs": {"enable_thinking": True}}),
        (
            {"thinking": {"type": "adaptive"}, "output_config": {"effort": "xhigh"}},
            {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "xhigh"},
        ),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 60}, "output_config": {"effort": "low"}},
            {"chat_template_kwargs": {"enable_thinking": True}, "thinking_budget": 60},
        ),
    ],
)
def test_a_wish_to_think_becomes_a_switch_with_a_budget_or_an_effort(asked, canonical):
    found = chat(**asked)
    names = ("chat_template_kwargs", "thinking_budget", "reasoning_effort")
    assert {name: found[name] for name in names if name in found} == canonical


@pytest.mark.parametrize(
    ("choice", "canonical"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "look"}, {"type": "function", "function": {"name": "look"}}),
    ],
)
def test_the_choice_of_tools(choice, canonical):
    found = chat(tools=[TOOL], tool_choice=choice)
    assert found["tool_choice"] == canonical
    assert "parallel_tool_calls" not in found
    both = chat(tools=[TOOL], tool_choice={**choice, "disable_parallel_tool_use": True})
    assert both["parallel_tool_calls"] is False


def test_a_choice_without_tools_says_nothing():
    assert "tool_choice" not in chat(tool_choice={"type": "auto"}, tools=[])


def test_a_strict_tool_stays_strict():
    assert chat(tools=[{**TOOL, "strict": True}])["tools"][0]["function"]["strict"] is True


def test_results_of_tools_come_before_what_else_the_user_says():
    result = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "1"}] * 2}
    assert messages(("user", [{"type": "text", "text": "Go on"}, result, {**result, "content": None}])) == [
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "1"}] * 2},
        {"role": "tool", "tool_call_id": "a", "content": ""},
        {"role": "user", "content": "Go on"},
    ]


def test_a_call_without_a_text_has_none():
    call = {"type": "tool_use", "id": "a", "name": "look", "input": {}}
    said = messages(("user", "Hi"), ("assistant", [call]), ("user", "Go on"))[1]
    assert said["content"] is None
    assert "reasoning_content" not in said


def test_a_thought_is_accepted_with_any_signature_or_none():
    thought = {"type": "thinking", "thinking": "Hm."}
    for block in (thought, {**thought, "signature": ""}, {**thought, "signature": "of another provider"}):
        said = messages(
            ("user", "Hi"), ("assistant", [block, {"type": "text", "text": "Yes"}]), ("user", "?")
        )[1]
        assert said == {"role": "assistant", "content": "Yes", "reasoning_content": "Hm."}


def test_a_thought_that_nobody_can_read_is_left_out():
    hidden = {"type": "redacted_thinking", "data": "x"}
    said = messages(("user", "Hi"), ("assistant", [hidden, {"type": "text", "text": "Yes"}]), ("user", "?"))
    assert said[1] == {"role": "assistant", "content": "Yes"}


@pytest.mark.parametrize(
    ("block", "texts"),
    [
        ({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "A"}}, ["A"]),
        (
            {
                "type": "document",
                "title": "T",
                "source": {"type": "content", "content": [{"type": "text", "text": "A"}]},
            },
            ["T\n", "A"],
        ),
        (
            {
                "type": "search_result",
                "source": "page 3",
                "title": "T",
                "content": [{"type": "text", "text": "A"}],
            },
            ["page 3\n", "T\n", "A"],
        ),
        ({"type": "tool_reference", "tool_name": "look"}, ["look"]),
    ],
)
def test_what_has_a_text_is_told_as_text(block, texts):
    found = messages(("user", [{"type": "text", "text": "Read:"}, block]))[0]["content"]
    assert [part["text"] for part in found] == ["Read:", *texts]


@pytest.mark.parametrize(
    ("source", "url"),
    [
        ({"type": "base64", "media_type": "image/png", "data": "iVBO"}, "data:image/png;base64,iVBO"),
        ({"type": "url", "url": "https://example.org/a.png"}, "https://example.org/a.png"),
    ],
)
def test_an_image_goes_to_the_neuron_which_knows_whether_its_model_sees(source, url):
    image = {"type": "image", "source": source}
    part = {"type": "image_url", "image_url": {"url": url}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [image]}
    assert messages(("user", [image]))[0]["content"] == [part]
    assert messages(("user", [result]))[0]["content"] == [part]


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({"max_tokens": None}, "max_tokens", "missing"),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"temperature": 3}, "temperature", "<= 2"),
        ({"top_k": -1}, "top_k", ">= 0"),
        ({"messages": []}, "messages", ">= 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", '"tool"'),
        ({"messages": [HELLO, {"role": "assistant", "content": "I"}]}, "messages[1]", "end with a user"),
        ({"stop_sequences": ["a", ""]}, "stop_sequences", "empty"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences", "at most 16"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens", "missing"),
        ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "thinking.budget_tokens", "less than"),
        ({"thinking": {"type": "often"}}, "thinking.type", "often"),
        ({"tools": [{"name": "look"}]}, "tools[0].input_schema", "missing"),
        (
            {"tools": [TOOL, {"type": "web_search_20250305", "name": "web_search"}]},
            "tools[1].type",
            "web_search_20250305",
        ),
        ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "tool_choice.name", "missing"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers", "not supported"),
        ({"container": "c"}, "container", "not supported"),
        ({"compaction": {"type": "summary"}}, "compaction", "not supported"),
        ({"thread": {"type": "create"}}, "thread", "not supported"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort", "huge"),
        ({"max_token": 5}, "max_token", "did you mean 'max_tokens'?"),
        ({"system": [{"type": "image"}]}, "system[0].type", "expected 'text'"),
    ],
)
def test_what_is_wrong_is_named(asked, param, words):
    error = refusal(**asked)
    assert error.param == param
    assert words in error.message


@pytest.mark.parametrize(
    ("role", "block", "param"),
    [
        ("user", {"type": "audio"}, ".type"),
        ("user", {"type": "tool_use", "id": "a", "name": "b", "input": {}}, ".type"),
        ("user", {"type": "text"}, ".text"),
        ("user", {"type": "tool_result", "content": "x"}, ".tool_use_id"),
        ("user", {"type": "image"}, ".source"),
        ("user", {"type": "image", "source": {"type": "file", "file_id": "f"}}, ".source"),
        ("user", {"type": "document", "source": {"type": "base64", "data": "JVBE"}}, ".source"),
        ("user", {"type": "document"}, ".source"),
        ("user", {"type": "container_upload", "file_id": "f"}, ".type"),
        ("assistant", {"type": "server_tool_use", "id": "a", "name": "web_search", "input": {}}, ".type"),
        ("assistant", {"type": "tool_use", "id": "a", "name": "b"}, ".input"),
        ("assistant", {"type": "thinking"}, ".thinking"),
    ],
)
def test_a_block_that_cannot_be_told_is_refused_by_its_path(role, block, param):
    text = {"type": "text", "text": "a"}
    error = refusal(messages=[HELLO, {"role": role, "content": [text, block]}, HELLO])
    assert error.param == f"messages[1].content[1]{param}"
    assert error.param in error.message or block["type"] in error.message


def test_the_blocks_within_a_result_are_named_as_well():
    inner = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "audio"}]}
    error = refusal(messages=[{"role": "user", "content": [inner]}])
    assert error.param == "messages[0].content[0].content[0].type"


def test_fields_of_betas_are_let_pass_when_the_client_says_that_it_sends_some():
    assert "speedy" not in json.loads(parse(is_beta=True, speedy={"a": 1}).to_chat())
    assert refusal(speedy={"a": 1}).param == "speedy"


def test_a_conversation_that_ends_with_the_assistant_can_be_counted():
    turns = [HELLO, {"role": "assistant", "content": "I"}]
    assert json.loads(parse(messages=turns).to_tokenize())["messages"] == turns


@pytest.mark.parametrize(
    ("body", "kind"), [(b"{", MalformedJson), (b"{}", MissingModel), (b"[]", InvalidParameter)]
)
def test_a_body_that_is_no_request(body, kind):
    with pytest.raises(kind):
        parse_messages(body)


def test_an_empty_model_is_missing():
    with pytest.raises(MissingModel):
        parse(model="")


def test_arguments_keep_their_order_and_letters():
    call = {"type": "tool_use", "id": "a", "name": "look", "input": {"z": "ü", "a": [1, None]}}
    said = messages(("user", "Hi"), ("assistant", [call]), ("user", "?"))[1]
    assert said["tool_calls"][0]["function"]["arguments"] == '{"z":"ü","a":[1,null]}'
    assert msgspec.json.decode(said["tool_calls"][0]["function"]["arguments"]) == call["input"]


LEAVES = st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=3)
VALUES = (
    LEAVES | st.lists(LEAVES, max_size=2) | st.dictionaries(st.sampled_from(["type", "text", "x"]), LEAVES)
)


@given(
    st.sampled_from(TRANSCRIPTS), st.lists(st.tuples(st.integers(0, 10**6), VALUES), min_size=1, max_size=3)
)
def test_any_body_is_understood_or_refused_as_wrong(path, changes):
    body = json.loads(path.read_text())["request"]
    for place, value in changes:
        places = list(_places(body))
        within, key = places[place % len(places)]
        within[key] = value
    with suppress(BadRequest):
        parse_chat(parse_messages(json.dumps(body).encode()).to_chat())


def _places(value):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)
