import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from helexa.errors import (
    BadRequest,
    ContextTooLong,
    HelexaError,
    InvalidParameter,
    MissingModel,
    Overloaded,
    UpstreamClosed,
    UpstreamError,
)
from helexa.wire import sse
from helexa.wire.responses import (
    CountTranslator,
    ResponsesRequest,
    ResponseTranslator,
    listed,
    parse_responses,
    renamed,
    shortened,
)
from helexa.wire.responses.custom_input import CustomInput, arguments_of
from helexa.wire.responses.reasoning import MAX_BYTES, seal, unseal
from helexa.wire.responses.translator import REPEAT_AFTER

TRANSCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("codex_*.json"))
EVENTS = TypeAdapter[Any](ResponseStreamEvent)
TOKEN = "0123456789abcdef0123456789abcdef"
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
PATCH = {"type": "custom", "name": "patch", "description": "Changes files."}
CREW = {
    **{"type": "namespace", "name": "crew", "description": "Helpers."},
    "tools": [{"type": "function", "name": "call"}],
}
Json = dict[str, Any]


def asked(**members: Any) -> ResponsesRequest:
    return parse_responses(json.dumps({"model": "tiny", "input": "Hello", **members}).encode())


def chat(**members: Any) -> Json:
    """The canonical request for these members."""
    request = asked(**members)
    body: Json = json.loads(request.to_chat(request.items)[0])
    return body


def messages(*items: Json, **members: Any) -> list[Json]:
    said: list[Json] = chat(input=list(items), **members)["messages"]
    return said


def translator(**members: Any) -> ResponseTranslator:
    request = asked(**members)
    return ResponseTranslator(request, request.to_chat(request.items)[1], token=TOKEN, created_at=1790000000)


def chunk(delta: Json | None = None, finish: str | None = None, **more: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish, **more}]
    return sse.encode({"id": "chatcmpl-1", "created": 1, "model": "tiny", "choices": choices})


def call(index: int, name: str | None = None, arguments: str = "") -> bytes:
    head = {} if name is None else {"id": f"call_{index}", "type": "function"}
    function = {"arguments": arguments} | ({} if name is None else {"name": name})
    return chunk({"tool_calls": [{"index": index, **head, "function": function}]})


def end(reason: str = "stop") -> bytes:
    usage = {
        **{"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
        "prompt_tokens_details": {"cached_tokens": 5},
        "completion_tokens_details": {"reasoning_tokens": 3},
    }
    return chunk({}, reason) + sse.encode({"choices": [], "usage": usage}) + sse.DONE


def events_of(stream: bytes) -> list[Json]:
    """The events, each one valid by the types of the openai package and numbered in turn."""
    events = []
    for number, event in enumerate(sse.Parser().feed(stream)):
        members = json.loads(event.data)
        EVENTS.validate_python(members)
        assert event.name == members["type"]
        assert members["sequence_number"] == number
        events.append(members)
    return events


def streamed(*parts: bytes, **members: Any) -> list[Json]:
    made = translator(stream=True, **members)
    told = made.feed(chunk({"role": "assistant", "content": ""}))
    for part in parts:
        told += made.feed(part)
    return events_of(told + made.finish())


def kinds(events: list[Json]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


# requests


def test_a_text_is_a_message_of_the_user_and_instructions_lead() -> None:
    assert chat(instructions="Be brief.")["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]


def test_what_leads_the_conversation_becomes_one_system_message() -> None:
    said = messages(
        {"role": "developer", "content": [{"type": "input_text", "text": "Rule one."}]},
        {"type": "message", "role": "system", "content": "Rule two."},
        {"role": "user", "content": "Hi"},
        {"role": "developer", "content": "Rule three."},
        instructions="Be brief.",
    )
    assert said == [
        {"role": "system", "content": "Be brief.\n\nRule one.\n\nRule two."},
        {"role": "user", "content": "Hi"},
        {"role": "developer", "content": "Rule three."},
    ]


def test_items_of_one_turn_become_one_message_of_the_assistant() -> None:
    said = messages(
        {"role": "user", "content": "Weather?"},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": None,
            "encrypted_content": seal("Look."),
        },
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "One moment."}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"in":"Rome"}'},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "rain"}]},
        {"type": "message", "role": "assistant", "content": "Sun."},
        {"type": "message", "role": "assistant", "content": "And rain."},
    )
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"in":"Rome"}'}},
        {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
    ]
    assert said == [
        {"role": "user", "content": "Weather?"},
        {
            **{"role": "assistant", "content": "One moment.", "reasoning_content": "Look."},
            "tool_calls": calls,
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        {"role": "tool", "tool_call_id": "c2", "content": "rain"},
        {"role": "assistant", "content": "Sun."},
        {"role": "assistant", "content": "And rain."},
    ]


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"summary": [], "encrypted_content": seal("sealed"), "content": None}, "sealed"),
        ({"summary": [], "encrypted_content": "gAAAAB-of-another-server"}, None),
        ({"summary": [{"type": "summary_text", "text": "told"}], "encrypted_content": "gAAAA"}, "told"),
        ({"summary": [], "content": [{"type": "reasoning_text", "text": "raw"}]}, "raw"),
        ({"summary": [{"type": "summary_text", "text": "a"}, {"type": "summary_text", "text": "b"}]}, "ab"),
    ],
)
def test_reasoning_comes_back_from_whatever_carries_it(members: Json, text: str | None) -> None:
    said = messages(
        {"role": "user", "content": "Q"},
        {"type": "reasoning", "id": "rs_1", **members},
        {"role": "assistant", "content": "A"},
    )
    assert said[1].get("reasoning_content") == text
    assert said[1]["content"] == "A"


def test_damaged_reasoning_of_ours_is_refused_by_name() -> None:
    with pytest.raises(InvalidParameter, match=r"'input\[0\].encrypted_content' is damaged") as caught:
        chat(input=[{"type": "reasoning", "summary": [], "encrypted_content": seal("x" * 99)[:-8]}])
    assert caught.value.param == "input[0].encrypted_content"


def test_reasoning_that_would_unpack_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="too large"):
        unseal(seal("0" * (MAX_BYTES + 1)))


@given(st.text())
def test_sealed_reasoning_opens_to_the_same_text(text: str) -> None:
    assert unseal(seal(text)) == text


def test_images_reach_the_model_or_whoever_refuses_them() -> None:
    parts = [
        {"type": "input_text", "text": "What is this?"},
        {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "low"},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
        {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,AA=="},
    ]
    assert messages({"role": "user", "content": parts})[0]["content"] == [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,AA==", "filename": "a.pdf"}},
    ]


@pytest.mark.parametrize(
    ("item", "complaint"),
    [
        ({"type": "computer_call", "id": "x"}, r"'input\[0\]' is of type 'computer_call'; expected message"),
        ({"type": "web_search_call", "id": "x"}, r"'input\[0\]' is of type 'web_search_call'"),
        ({"foo": 1}, r"'input\[0\]' is of type 'nothing'"),
        ({"role": "narrator", "content": "x"}, r"'input\[0\].role' is 'narrator'; expected user"),
        ({"role": "user", "content": 7}, r"'input\[0\].content' is 7; expected a text or parts"),
        ({"role": "user", "content": ["x"]}, r"'input\[0\].content\[0\]' is 'x'; expected an object"),
        (
            {"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]},
            r"'input\[0\].content\[0\]' is of type 'input_image'",
        ),
        (
            {"role": "assistant", "content": [{"type": "input_image", "image_url": "data:"}]},
            r"'input\[0\].content' has a part that is not text; expected only text from the assistant",
        ),
        ({"type": "function_call", "name": "f", "call_id": "c"}, r"'input\[0\].arguments' is None"),
        ({"type": "function_call", "name": "f", "arguments": ""}, r"'input\[0\].call_id' is None"),
        (
            {"type": "function_call_output", "call_id": "c9", "output": ""},
            r"'input\[0\]' answers the call 'c9', which is not in the input before it",
        ),
    ],
)
def test_an_item_that_no_model_can_read_is_refused_by_name(item: Json, complaint: str) -> None:
    with pytest.raises(InvalidParameter, match=complaint):
        chat(input=[item])


@pytest.mark.parametrize(
    ("members", "error", "complaint"),
    [
        ({"model": ""}, MissingModel, "'model' is empty"),
        ({"input": None}, InvalidParameter, "'input' is missing"),
        ({"input": []}, InvalidParameter, "'input' is missing"),
        ({"background": True}, InvalidParameter, "'background' is not supported"),
        (
            {"conversation": "conv_1"},
            InvalidParameter,
            "'conversation' is not supported: .*previous_response_id",
        ),
        ({"prompt": {"id": "pmpt_1"}}, InvalidParameter, "'prompt' is not supported"),
        ({"context_management": [{"type": "compaction"}]}, InvalidParameter, "'context_management'"),
        ({"generate": False}, InvalidParameter, "'generate' is not supported"),
        ({"inptu": "x"}, InvalidParameter, "unknown field 'inptu'; did you mean 'input'"),
        ({"max_output_tokens": 0}, InvalidParameter, "'max_output_tokens' is 0"),
        ({"include": ["everything"]}, InvalidParameter, r"'include\[0\]' is"),
        ({"metadata": {"a": 1}}, InvalidParameter, r"'metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, InvalidParameter, "'metadata'"),
        ({"truncation": "maybe"}, InvalidParameter, "'truncation' is"),
        ({"top_logprobs": 2}, InvalidParameter, "'top_logprobs' is only allowed with"),
        ({"text": {"format": {"type": "yaml"}}}, InvalidParameter, "'text.format.type' is 'yaml'"),
        ({"text": {"format": {"type": "json_schema"}}}, InvalidParameter, "'text.format.schema' is missing"),
        ({"tool_choice": "maybe"}, InvalidParameter, "'tool_choice' is 'maybe'"),
        ({"tools": [{"name": "f"}]}, InvalidParameter, r"'tools\[0\].type' is None"),
        ({"tools": [WEATHER, WEATHER]}, InvalidParameter, r"'tools\[1\].name' is 'weather', as that of"),
        ({"tools": [{"type": "file_search"}]}, InvalidParameter, r"'tools\[0\]' is of type 'file_search'"),
        ({"tools": [WEATHER, {"type": "mcp"}]}, InvalidParameter, r"'tools\[1\]' is of type 'mcp', which no"),
        ({"tools": [{"type": "web_search"}]}, InvalidParameter, r"'tools\[0\]' is of type 'web_search'"),
        (
            {"tools": [WEATHER, {"type": "web_search"}], "tool_choice": {"type": "web_search"}},
            InvalidParameter,
            "is of type 'web_search'",
        ),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "tides"}},
            InvalidParameter,
            "'tool_choice' names 'tides', which is not among 'tools'",
        ),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, InvalidParameter, "which is not stored"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(
    members: Json, error: type[HelexaError], complaint: str
) -> None:
    def ask() -> None:
        request = asked(**members)
        request.to_chat(request.resolved({}))

    with pytest.raises(error, match=complaint):
        ask()


def test_fields_are_called_as_chat_calls_them() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    body = chat(
        **{"stream": True, "max_output_tokens": 50, "reasoning": {"effort": "low", "summary": "auto"}},
        **{"temperature": 0.5, "top_p": 0.9, "parallel_tool_calls": False, "top_k": 4, "seed": 1},
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
        include=["message.output_text.logprobs"],
        top_logprobs=3,
    )
    body.pop("messages")
    assert body == {
        **{"model": "tiny", "stream": True, "stream_options": {"include_usage": True}},
        **{"max_completion_tokens": 50, "reasoning_effort": "low", "temperature": 0.5, "top_p": 0.9},
        **{"parallel_tool_calls": False, "top_k": 4, "seed": 1, "logprobs": True, "top_logprobs": 3},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": schema, "strict": True},
        },
    }


def test_what_has_no_effect_is_accepted_and_not_passed_on() -> None:
    extra = {
        **{
            "metadata": {"a": "b"},
            "service_tier": "auto",
            "client_metadata": {"id": "1"},
            "background": False,
        },
        **{
            "prompt_cache_retention": "24h",
            "truncation": "disabled",
            "include": [],
            "tools": [],
            "store": True,
        },
        **{"max_tool_calls": 3, "text": {"format": {"type": "text"}}, "tool_choice": "auto"},
    }
    assert chat(**extra) == chat()


# tools


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


# streams


def test_a_text_is_told_in_the_order_that_clients_expect() -> None:
    events = streamed(chunk({"content": "Hel"}), chunk({"content": "lo"}), end())
    assert kinds(events) == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done", "completed"),
    ]
    response = events[-1]["response"]
    assert response["status"] == "completed"
    assert response["output"][0]["content"][0]["text"] == "Hello"
    assert response["usage"] == {
        **{"input_tokens": 11, "output_tokens": 7, "total_tokens": 18},
        "input_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 3},
    }
    assert Response.model_validate(response).output_text == "Hello"


def test_reasoning_is_told_as_its_text() -> None:
    events = streamed(chunk({"reasoning_content": "Hm"}), chunk({"content": "Hi"}), end())
    assert kinds(events)[2:8] == [
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done"),
        *("content_part.done", "output_item.done"),
    ]
    assert events[-1]["response"]["output"][0]["content"] == [{"type": "reasoning_text", "text": "Hm"}]
    assert "encrypted_content" not in events[-1]["response"]["output"][0]


def test_reasoning_is_told_as_a_summary_and_sealed_where_that_is_asked_for() -> None:
    events = streamed(
        chunk({"reasoning_content": "Hm"}),
        chunk({"content": "Hi"}),
        end(),
        reasoning={"summary": "auto"},
        include=["reasoning.encrypted_content"],
    )
    assert kinds(events)[2:8] == [
        *("output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta"),
        *("reasoning_summary_text.done", "reasoning_summary_part.done", "output_item.done"),
    ]
    item = events[-1]["response"]["output"][0]
    assert item["summary"] == [{"type": "summary_text", "text": "Hm"}]
    assert unseal(item["encrypted_content"]) == "Hm"
    # What a client sends back makes the same turn.
    back = messages({"role": "user", "content": "Q"}, *events[-1]["response"]["output"])
    assert back[1] == {"role": "assistant", "content": "Hi", "reasoning_content": "Hm"}


def test_calls_are_told_with_their_arguments_as_they_come() -> None:
    events = streamed(
        *(call(0, "weather"), call(0, arguments='{"in"'), call(0, arguments=': "Rome"}')),
        *(call(1, "crew__call"), call(1, arguments="{}")),
        *(call(2, "patch"), call(2, arguments='{"input": "a\\nb"}')),
        end("tool_calls"),
        tools=[WEATHER, PATCH, CREW],
    )
    arguments = ["function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert kinds(events)[2:] == [
        *("output_item.added", arguments[0], *arguments),
        *("output_item.added", *arguments),
        *("output_item.added", "custom_tool_call_input.delta", "custom_tool_call_input.done"),
        *("output_item.done", "completed"),
    ]
    weather, crew_call, patch = events[-1]["response"]["output"]
    assert (weather["name"], weather["arguments"], weather["call_id"]) == (
        *("weather", '{"in": "Rome"}'),
        "call_0",
    )
    assert (crew_call["namespace"], crew_call["name"], crew_call["arguments"]) == ("crew", "call", "{}")
    assert (patch["type"], patch["input"], patch["call_id"]) == ("custom_tool_call", "a\nb", "call_2")


def test_a_tool_of_a_namespace_is_found_by_its_bare_name_and_an_unknown_one_is_a_function() -> None:
    events = streamed(call(0, "call", "{}"), call(1, "tides", "{}"), end("tool_calls"), tools=[WEATHER, CREW])
    first, second = events[-1]["response"]["output"]
    assert (first["namespace"], first["name"]) == ("crew", "call")
    assert "namespace" not in second
    assert (second["type"], second["name"]) == ("function_call", "tides")


def test_a_call_without_arguments_has_an_empty_object() -> None:
    events = streamed(call(0, "weather"), end("tool_calls"), tools=[WEATHER])
    assert events[-1]["response"]["output"][0]["arguments"] == "{}"


def test_an_answer_that_reached_its_limit_is_incomplete() -> None:
    events = streamed(chunk({"content": "Hel"}), end("length"))
    assert kinds(events)[-2:] == ["output_item.done", "incomplete"]
    assert events[-2]["item"]["status"] == "incomplete"
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert events[-1]["response"]["usage"]["output_tokens"] == 7


@given(st.lists(st.integers(1, 8), min_size=1, max_size=8))
def test_events_are_the_same_however_many_come_at_once(sizes: list[int]) -> None:
    said = [chunk({"role": "assistant", "content": ""}), sse.comment("prefill 1/2"), sse.KEEP_ALIVE]
    said += [
        chunk({"reasoning_content": "Hm"}),
        chunk({"content": "Hi"}),
        call(0, "weather"),
        call(0, None, "{}"),
    ]
    said += [call(1, "patch", '{"input": "a'), call(1, None, 'b"}'), end("tool_calls")]
    members: Json = {"stream": True, "tools": [WEATHER, PATCH]}
    one_by_one = translator(**members)
    expected = b"".join(map(one_by_one.feed, said)) + one_by_one.finish()
    grouped, told, rest = translator(**members), b"", said
    for size in sizes:
        told += grouped.feed(b"".join(rest[:size]))
        rest = rest[size:]
    told += grouped.feed(b"".join(rest)) + grouped.finish()
    times = re.compile(rb'"completed_at":\d+')
    assert times.sub(b"", told) == times.sub(b"", expected)


def test_logprobs_come_with_the_text_they_belong_to() -> None:
    entry = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": []}
    events = streamed(
        chunk({"content": "Hi"}, logprobs={"content": [entry]}),
        end(),
        include=["message.output_text.logprobs"],
    )
    assert events[4]["logprobs"] == [entry]
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == [entry]


def test_silence_is_told_by_comments_and_now_and_then_by_an_event() -> None:
    made = translator(stream=True)
    told = b"".join(made.keep_alive() for _ in range(2 * REPEAT_AFTER))
    assert told.startswith(b"event: response.created\n")
    assert told.count(sse.KEEP_ALIVE) == 2 * REPEAT_AFTER
    assert kinds(events_of(told)) == ["created", *["in_progress"] * 3]


def test_the_prefill_says_how_far_it_is() -> None:
    made = translator(stream=True)
    told = b"".join(made.feed(sse.comment(f"prefill {done}/100")) for done in range(REPEAT_AFTER))
    assert b": prefill 7/100\n\n" in told
    assert events_of(told)[-1]["response"]["helexa_progress"] == {
        "prompt_tokens": 100,
        "computed_tokens": REPEAT_AFTER - 1,
    }
    rest = made.feed(chunk({"content": "Hi"}) + end()) + made.finish()
    assert "helexa_progress" not in events_of(told + rest)[-1]["response"]


def test_the_neurons_usage_comment_stays_with_us() -> None:
    made = translator(stream=True)
    made.keep_alive()
    assert made.feed(sse.comment('{"prompt_tokens": 1}')) == b""


@pytest.mark.parametrize(
    ("opening", "kind"),
    [
        (chunk({"content": "Hi"}), "output_text"),
        (chunk({"reasoning_content": "Hm"}), "reasoning_text"),
        (call(0, "weather", "{"), "function_call_arguments"),
        (call(0, "patch", '{"in'), "custom_tool_call_input"),
    ],
)
def test_silence_amid_an_item_is_now_and_then_an_empty_piece_of_it(opening: bytes, kind: str) -> None:
    made = translator(stream=True, tools=[WEATHER, PATCH])
    told = made.feed(opening)
    silence = b"".join(made.keep_alive() for _ in range(REPEAT_AFTER))
    assert silence.startswith(sse.KEEP_ALIVE * REPEAT_AFTER + f"event: response.{kind}.delta\n".encode())
    events = events_of(told + silence + made.feed(end()) + made.finish())
    assert "" in [event.get("delta") for event in events]
    with_silence, without = (
        events[-1]["response"],
        streamed(opening, end(), tools=[WEATHER, PATCH])[-1]["response"],
    )
    for response in (with_silence, without):
        del response["completed_at"]
    assert with_silence == without


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ContextTooLong("the prompt has 9 tokens"), "context_length_exceeded", "the prompt has 9 tokens"),
        (Overloaded("the queue is full", retry_after_s=4), "rate_limit_exceeded", "try again in 4s"),
        (UpstreamClosed("gone"), "server_error", "gone"),
        (InvalidParameter("'messages[0]' is an image", param="messages[0]"), "invalid_prompt", "'input'"),
    ],
)
def test_a_failure_ends_the_stream_with_a_code_that_agents_act_upon(
    error: HelexaError, code: str, words: str
) -> None:
    made = translator(stream=True)
    told = made.failure(error)
    assert made.failure(error) + made.finish() + made.feed(chunk({"content": "x"})) == b""
    members = [json.loads(event.data) for event in sse.Parser().feed(told)]
    assert kinds(members) == ["created", "in_progress", "failed"]
    response = members[-1]["response"]
    assert (response["status"], response["error"]["code"]) == ("failed", code)
    assert words in response["error"]["message"]


def test_a_failure_amid_the_answer_keeps_what_was_said() -> None:
    made = translator(stream=True)
    told = made.feed(chunk({"content": "Hel"})) + made.failure(UpstreamClosed("gone"))
    events = events_of(told)
    assert kinds(events)[-2:] == ["output_text.delta", "failed"]
    message = events[-1]["response"]["output"][0]
    assert (message["status"], message["content"][0]["text"]) == ("incomplete", "Hel")


@pytest.mark.parametrize("name", ["weather", "patch"])
def test_a_call_that_is_cut_short_is_never_said_to_be_done(name: str) -> None:
    events = streamed(call(0, name, '{"input": "rm -r /tm'), end("length"), tools=[WEATHER, PATCH])
    assert kinds(events)[-2:] in (
        ["function_call_arguments.delta", "incomplete"],
        ["custom_tool_call_input.delta", "incomplete"],
    )
    assert events[-1]["response"]["output"][0]["status"] == "incomplete"


def test_an_error_event_of_the_neuron_fails_the_response() -> None:
    error = {"error": {"message": "no memory left", "type": "api_error", "code": "device_error"}}
    events = streamed(chunk({"content": "Hi"}), sse.encode(error) + chunk({}, "error") + sse.DONE)
    assert kinds(events)[-1] == "failed"
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "no memory left"}


@pytest.mark.parametrize("garbage", [b"data: {\n\n", call(0, arguments="{}")])
def test_a_stream_that_is_not_understood_fails_the_response(garbage: bytes) -> None:
    events = streamed(garbage, end())
    assert kinds(events)[-1] == "failed"
    assert "not understood" in events[-1]["response"]["error"]["message"]


# whole answers


def test_a_whole_answer_holds_what_its_stream_would() -> None:
    members: Json = {"tools": [WEATHER, PATCH], "include": ["reasoning.encrypted_content"]}
    streamed_response = streamed(
        *(chunk({"reasoning_content": "Hm"}), chunk({"content": "Let me see."})),
        *(call(0, "weather", "{}"), call(1, "patch", '{"input": "x"}'), end("tool_calls")),
        **members,
    )[-1]["response"]
    calls = [
        {"id": "call_0", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
        {"id": "call_1", "type": "function", "function": {"name": "patch", "arguments": '{"input": "x"}'}},
    ]
    message = {
        **{"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm"},
        "tool_calls": calls,
    }
    usage = {"prompt_tokens": 11, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 5}}
    usage["completion_tokens_details"] = {"reasoning_tokens": 3}
    answer = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}], "usage": usage}
    whole = json.loads(translator(**members).whole(json.dumps(answer).encode()))
    Response.model_validate(whole)
    for response in (whole, streamed_response):
        del response["completed_at"]
    assert whole == streamed_response


def test_a_count_is_told_as_clients_expect() -> None:
    told = json.loads(CountTranslator().whole(b'{"count": 7, "max_model_len": 9, "tokens": []}'))
    assert told == {"object": "response.input_tokens", "input_tokens": 7}
    with pytest.raises(UpstreamError, match="not understood"):
        CountTranslator().whole(b"{}")


def test_a_whole_answer_that_is_not_understood_is_an_error_of_the_neuron() -> None:
    with pytest.raises(UpstreamError, match="not understood"):
        translator().whole(b"<html>")


def test_a_response_repeats_what_was_asked() -> None:
    response = translator(
        **{"instructions": "Be brief.", "metadata": {"a": "b"}, "max_output_tokens": 9, "store": False},
        **{"previous_response_id": "resp_1", "truncation": "disabled", "temperature": 0.5},
        reasoning={"effort": "high"},
    ).response
    Response.model_validate(response)
    assert response["id"] == f"resp_{TOKEN}"
    assert (response["instructions"], response["metadata"]) == ("Be brief.", {"a": "b"})
    assert (response["max_output_tokens"], response["store"]) == (9, False)
    assert (response["previous_response_id"], response["temperature"]) == ("resp_1", 0.5)
    assert response["reasoning"] == {"effort": "high", "summary": None}


# what agents send, in texts of our own


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_requests_of_codex_become_canonical_chat(path: Path) -> None:
    transcript = json.loads(path.read_text("utf-8"))
    request = parse_responses(json.dumps(transcript["request"]).encode())
    assert json.loads(request.to_chat(request.items)[0]) == transcript["canonical"]


def test_there_are_transcripts() -> None:
    assert len(TRANSCRIPTS) == 4


anything = st.sampled_from([None, True, 7, 10**30, "", "a", [], {}, [{}], ["a"], {"type": []}, {"tools": 7}])


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container within `value`, with each of its keys or indexes."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in inner:
        yield value, key
        yield from places(member)


@settings(deadline=None)
@given(st.data())
def test_whatever_one_place_of_a_request_holds_it_is_served_or_refused(data: st.DataObject) -> None:
    transcript = data.draw(st.sampled_from(TRANSCRIPTS))
    members = json.loads(transcript.read_text("utf-8"))["request"]
    container, key = data.draw(st.sampled_from(list(places(members))))
    container[key] = data.draw(anything)
    try:
        request = asked(**members)
        given_items = request.resolved({})
        body, offered = request.to_chat(given_items)
    except BadRequest:
        return
    assert json.loads(body)["messages"]
    made = ResponseTranslator(request, offered)
    json.loads(made.whole(b'{"choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}]}'))
    assert len(listed(given_items, TOKEN)) == len(given_items)


# truncation


def too_long(found: int, most: int) -> ContextTooLong:
    return ContextTooLong("too long", max=most, prompt_tokens=found)


def test_a_conversation_is_shortened_from_its_beginning() -> None:
    said = [{"role": "system", "content": "Be brief."}]
    said += [{"role": role, "content": f"{n} " * 50} for n in range(6) for role in ("user", "assistant")]
    said += [{"role": "user", "content": "Go on."}]
    body = json.dumps({"model": "tiny", "messages": said, "max_completion_tokens": 10}).encode()
    shorter = shortened(body, too_long(700, 400))
    assert shorter is not None
    left = json.loads(shorter)["messages"]
    assert left[0] == said[0]
    assert left[1:] == said[7:]
    assert json.loads(shorter) | {"messages": said} == json.loads(body)


def test_the_results_of_a_call_go_with_it() -> None:
    said = [
        {"role": "user", "content": "x" * 100},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "tool_call_id": "c", "content": "y" * 900},
        {"role": "assistant", "content": "The last."},
    ]
    shorter = shortened(json.dumps({"messages": said}).encode(), too_long(300, 290))
    assert shorter is not None
    assert json.loads(shorter)["messages"] == said[3:]


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ([{"role": "user", "content": "x"}], too_long(9, 5)),
        ([{"role": "system", "content": "x"}, {"role": "user", "content": "x"}], too_long(9, 5)),
        (
            [{"role": "assistant", "content": None}, {"role": "tool", "tool_call_id": "c", "content": "x"}],
            too_long(9, 5),
        ),
        ([{"role": "user", "content": "x"}] * 3, ContextTooLong("nobody counted")),
    ],
)
def test_what_cannot_be_shortened_is_not(said: list[Json], error: HelexaError) -> None:
    assert shortened(json.dumps({"messages": said}).encode(), error) is None


@given(
    st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), min_size=1, max_size=12),
    st.integers(2, 1000),
    st.integers(1, 2000),
)
def test_every_shortening_is_shorter_and_keeps_both_ends(roles: list[str], most: int, over: int) -> None:
    said = [{"role": role, "content": str(index)} for index, role in enumerate(roles)]
    left = said
    while (
        shorter := shortened(json.dumps({"messages": left}).encode(), too_long(most + over, most))
    ) is not None:
        fewer = json.loads(shorter)["messages"]
        assert len(fewer) < len(left)
        assert fewer[-1] == said[-1]
        assert (roles[0] == "system") == (fewer[0]["role"] == "system" and fewer[0] == said[0])
        left = fewer


# errors, stored items


@pytest.mark.parametrize(
    ("param", "expected"),
    [
        ("messages[2].content[0]", "input"),
        ("max_completion_tokens", "max_output_tokens"),
        ("response_format.json_schema.schema", "text.format.schema"),
        ("response_format", "text.format"),
        ("temperature", "temperature"),
    ],
)
def test_errors_name_fields_as_the_client_knows_them(param: str, expected: str) -> None:
    error = renamed(InvalidParameter(f"'{param}' is wrong", param=param))
    assert (error.param, error.message) == (expected, f"'{expected}' is wrong")


def test_listed_items_have_ids_and_parts_and_say_the_same() -> None:
    items: list[Json] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "ok"},
        {"type": "reasoning", "id": "rs_1", "content": None},
    ]
    shown = listed(items, TOKEN)
    assert [item["id"] for item in shown] == [*(f"item_{TOKEN}_{index}" for index in range(4)), "rs_1"]
    assert shown[0]["content"] == [{"type": "input_text", "text": "Hi"}]
    assert messages(*shown) == messages(*items)


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
