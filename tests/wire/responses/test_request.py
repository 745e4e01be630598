"""Requests of the Responses API as chat requests, and their fields in errors."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa.errors import BadRequest, HelexaError, InvalidParameter, MissingModel
from helexa.wire.responses import ResponseTranslator, listed, parse_responses, renamed
from helexa.wire.responses.reasoning import MAX_BYTES, seal, unseal
from support.request_bodies import places
from support.responses import TOKEN, WEATHER, Json, asked, chat, messages

TRANSCRIPTS = sorted((Path(__file__).parents[1] / "transcripts").glob("codex_*.json"))


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
            r"'input\[0\].call_id' is 'c9', and no such call is in the input before it",
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


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_requests_of_codex_become_canonical_chat(path: Path) -> None:
    transcript = json.loads(path.read_text("utf-8"))
    request = parse_responses(json.dumps(transcript["request"]).encode())
    assert json.loads(request.to_chat(request.items)[0]) == transcript["canonical"]


def test_there_are_transcripts() -> None:
    assert len(TRANSCRIPTS) == 4


anything = st.sampled_from([None, True, 7, 10**30, "", "a", [], {}, [{}], ["a"], {"type": []}, {"tools": 7}])


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
