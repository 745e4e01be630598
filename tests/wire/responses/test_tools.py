"""Tools of the Responses API: functions of chat, custom tools, namespaces, searches."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.errors import InvalidParameter
from helexa.wire.responses.custom_input import CustomInput, arguments_of
from support.responses import CREW, PATCH, WEATHER, call, chat, end, kinds, messages, streamed, translator


def test_every_kind_of_tool_is_a_function_of_chat() -> None:
    grammar = {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'}
    body = chat(
        tools=[
            WEATHER,
            {**PATCH, "format": grammar},
            {
                **{"type": "namespace", "name": "crew", "description": "Helpers."},
                "tools": [
                    {"type": "function", "name": "call", "description": "Calls one.", "parameters": {}},
                    {"type": "custom", "name": "note"},
                ],
            },
            {"type": "namespace", "name": "mcp__files__", "tools": [{"type": "function", "name": "read"}]},
            {"type": "web_search", "external_web_access": True},
        ],
        tool_choice="auto",
    )
    functions = {tool["function"]["name"]: tool["function"] for tool in body["tools"]}
    assert list(functions) == ["weather", "patch", "crew__call", "crew__note", "mcp__files__read"]
    assert functions["weather"] == {"name": "weather", "parameters": {"type": "object"}, "strict": False}
    assert functions["crew__call"]["description"] == "Helpers.\n\nCalls one."
    parameters = functions["patch"]["parameters"]
    assert parameters["required"] == ["input"]
    assert 'lark grammar:\nstart: "a"' in parameters["properties"]["input"]["description"]


def test_what_is_left_out_is_not_among_the_tools_of_the_response() -> None:
    made = translator(tools=[WEATHER, {"type": "web_search"}])
    assert made.response["tools"] == [WEATHER]


@pytest.mark.parametrize(
    ("choice", "expected", "names"),
    [
        ("none", "none", ["weather", "patch"]),
        ("required", "required", ["weather", "patch"]),
        (
            {"type": "function", "name": "weather"},
            {"type": "function", "function": {"name": "weather"}},
            ["weather", "patch"],
        ),
        (
            {"type": "custom", "name": "patch"},
            {"type": "function", "function": {"name": "patch"}},
            ["weather", "patch"],
        ),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]},
            "required",
            ["weather"],
        ),
    ],
)
def test_a_choice_of_tools_is_said_as_chat_says_it(choice: Any, expected: Any, names: list[str]) -> None:
    body = chat(tools=[WEATHER, PATCH], tool_choice=choice)
    assert body["tool_choice"] == expected
    assert [tool["function"]["name"] for tool in body["tools"]] == names


def test_tools_may_come_as_items_of_the_input() -> None:
    added = {"type": "additional_tools", "role": "developer", "tools": [WEATHER]}
    body = chat(input=[added, {"role": "user", "content": "Hi"}])
    assert body["tools"][0]["function"]["name"] == "weather"
    assert body["messages"] == [{"role": "user", "content": "Hi"}]


def test_calls_in_the_history_have_the_names_that_the_model_knows() -> None:
    said = messages(
        {"type": "function_call", "call_id": "1", "name": "call", "namespace": "crew", "arguments": "{}"},
        {"type": "custom_tool_call", "call_id": "2", "name": "patch", "input": 'say "hi"'},
        {"type": "custom_tool_call_output", "call_id": "2", "output": "ok"},
    )
    functions = [made["function"] for made in said[0]["tool_calls"]]
    assert functions == [
        {"name": "crew__call", "arguments": "{}"},
        {"name": "patch", "arguments": '{"input": "say \\"hi\\""}'},
    ]
    assert said[1] == {"role": "tool", "tool_call_id": "2", "content": "ok"}


@given(st.text(), st.data())
def test_the_text_of_a_custom_call_is_the_same_for_any_split_of_its_arguments(
    text: str, data: st.DataObject
) -> None:
    for arguments in (arguments_of(text), json.dumps({"input": text})):
        cuts = sorted(data.draw(st.lists(st.integers(0, len(arguments)), max_size=6)))
        reader = CustomInput()
        places = [0, *cuts, len(arguments)]
        pieces = [reader.feed(arguments[a:b]) for a, b in pairwise(places)]
        assert "".join(pieces) + reader.finish() == text


def test_the_text_of_a_custom_call_comes_as_soon_as_it_can_be_known() -> None:
    reader = CustomInput()
    pieces = ['{"inp', 'ut": "a', "b\\", "n\\ud83d", '\\ude00c"', "}"]
    assert [reader.feed(piece) for piece in pieces] == ["", "a", "b", "\n", "\U0001f600c", ""]
    assert reader.finish() == ""


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"patch": "x"}', "x"),
        ('{"note": 1, "input": "x"}', "x"),
        ('"x"', "x"),
        ("plain", "plain"),
        ('{"a": "x", "b": "y"}', '{"a": "x", "b": "y"}'),
        ("", ""),
        (r'{"input": "\d+ \u00e9 \user \u12"}', r"\d+ é \user \u12"),
        (r'{"input": "\ud83d and \udc00"}', "\ufffd and \ufffd"),
        (r'{"input": "\ud83d\n\ud83dx\ud83d"}', "\ufffd\n\ufffdx\ufffd"),
        ('{"input": "two\nlines"}', "two\nlines"),
        ('{"input": "cut sh', "cut sh"),
    ],
)
def test_arguments_of_another_shape_still_give_their_text(arguments: str, text: str) -> None:
    reader = CustomInput()
    assert reader.feed(arguments) + reader.finish() == text


def test_a_client_may_search_for_tools_which_are_offered_from_then_on() -> None:
    search = {
        "type": "tool_search",
        "execution": "client",
        "description": "Finds.",
        "parameters": {"type": "object"},
    }
    events = streamed(
        call(0, "tool_search", '{"query":'), call(0, arguments=' "crew"}'), end(), tools=[search]
    )
    assert kinds(events)[2:] == ["output_item.added", "output_item.done", "completed"]
    made = events[-1]["response"]["output"][0]
    assert (made["type"], made["execution"], made["arguments"]) == (
        *("tool_search_call", "client"),
        {"query": "crew"},
    )
    found = {"type": "tool_search_output", "call_id": made["call_id"], "execution": "client", "tools": [CREW]}
    body = chat(tools=[search], input=[{"role": "user", "content": "Q"}, made, found, found])
    assert [tool["function"]["name"] for tool in body["tools"]] == ["tool_search", "crew__call"]
    assert body["messages"][1]["tool_calls"][0]["function"] == {
        "name": "tool_search",
        "arguments": '{"query": "crew"}',
    }
    assert body["messages"][2]["content"] == '{"tools": ["crew__call"]}'


def test_a_search_for_tools_by_the_server_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="'tool_search', which no server here runs"):
        chat(tools=[{"type": "tool_search"}])
