"""Answers of chat as responses: the events of streams, and whole ones."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response

from helexa.errors import (
    ContextTooLong,
    HelexaError,
    InvalidParameter,
    Overloaded,
    UpstreamClosed,
    UpstreamError,
)
from helexa.wire import sse
from helexa.wire.responses import CountTranslator
from helexa.wire.responses.reasoning import unseal
from helexa.wire.responses.translator import REPEAT_AFTER
from support.responses import (
    CREW,
    PATCH,
    TOKEN,
    WEATHER,
    Json,
    call,
    chunk,
    end,
    events_of,
    kinds,
    messages,
    streamed,
    translator,
)


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
