"""Chat with reasoning, tools and formats: the official package, connections, the real engine, a script."""

import asyncio
import json
from typing import Any, Literal

import openai
import pydantic
import pytest

from support.scripted_engine import TEMPLATE, scripted_engine

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["town"],
        },
    },
}


def strict(**properties: Any) -> dict[str, Any]:
    required = list(properties)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SWITCH = {
    "type": "function",
    "function": {"name": "light", "parameters": strict(to={"enum": ["on", "off"]})},
}
BROKEN = {"type": "function", "function": {"name": "broken", "parameters": strict(x={"type": "wat"})}}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": strict()},
}
SUNNY = '<tool_call>\n{"name": "weather", "arguments": {"town": "Århus", "days": 2}}\n</tool_call>'
SCRIPT = {
    "Hello": "A greeting.\n</think>\n\nGood day, ça va?",
    "Ponder": "hm " * 200 + "\n</think>\n\nForty-two.",
    "Weather?": f"I need the tool.\n</think>\n\nLet me see.\n{SUNNY}",
    "Both?": "</think>\n\n" + SUNNY + '\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
    "<tool_response>\nsun\n</tool_response>": "It says sun.\n</think>\n\nTwo sunny days.",
    "Show me": "</think>\n\nText like <tool_call> is no call.",
    "Town?": '</think>\n\n{"name": "Århus", "size": "big"}',
}


def ask(text: str, **fields: Any) -> dict[str, Any]:
    asked = {
        "model": "m",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 800,
    }
    return asked | fields


@pytest.fixture
async def api(serve_engine):
    async with serve_engine(scripted_engine(SCRIPT)) as client:
        yield client


async def pieces(api: openai.AsyncOpenAI, **fields: Any) -> list[Any]:
    stream = await api.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    return [chunk async for chunk in stream]


def texts(chunks: list[Any], name: str, index: int = 0) -> str:
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(getattr(delta, name, None) or "" for delta in deltas)


def calls_of(chunks: list[Any]) -> list[tuple[str, str]]:
    """Name and arguments of each call, put together as clients do."""
    calls: dict[int, list[str]] = {}
    for chunk in chunks:
        for delta in chunk.choices[0].delta.tool_calls or () if chunk.choices else ():
            if delta.id:
                assert delta.index == len(calls)
                assert delta.type == "function"
                calls[delta.index] = [delta.function.name, ""]
            calls[delta.index][1] += delta.function.arguments or ""
    return [(name, arguments) for name, arguments in calls.values()]


# Reasoning


async def test_reasoning_is_apart_from_content_and_counted(api):
    answer = await api.chat.completions.create(**ask("Hello"))
    message = answer.choices[0].message
    assert message.content == "Good day, ça va?"
    assert message.reasoning_content == "A greeting."
    assert answer.choices[0].finish_reason == "stop"
    details = answer.usage.completion_tokens_details
    assert len("A greeting.") <= details.reasoning_tokens < answer.usage.completion_tokens


async def test_a_stream_says_the_same_as_a_whole_answer(api):
    whole = await api.chat.completions.create(**ask("Hello"))
    chunks = await pieces(api, **ask("Hello"))
    assert texts(chunks, "reasoning_content") == whole.choices[0].message.reasoning_content
    assert texts(chunks, "content") == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    kinds = ["r" if getattr(c.choices[0].delta, "reasoning_content", None) else "c" for c in chunks[1:-2]]
    assert kinds == sorted(kinds, reverse=True)  # first all reasoning, then all content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.completion_tokens_details == whole.usage.completion_tokens_details


@pytest.mark.parametrize(
    "fields",
    [
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        {"extra_body": {"thinking_budget": 0}},
        {"reasoning_effort": "none"},
    ],
)
async def test_reasoning_can_be_turned_off(api, fields):
    answer = await api.chat.completions.create(**ask("Hello", **fields))
    assert answer.choices[0].message.content == "Good day, ça va?"
    assert getattr(answer.choices[0].message, "reasoning_content", None) is None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"extra_body": {"thinking_budget": 30}}, 30),
        ({"max_tokens": 100, "reasoning_effort": "low"}, 20),
        ({"max_tokens": 100}, 50),
        ({"max_tokens": 400, "extra_body": {"thinking_budget": 5000}}, 376),
        ({"max_tokens": 600, "reasoning_effort": "max"}, 570),
        ({"max_tokens": 20}, 0),
    ],
)
async def test_reasoning_over_its_budget_gives_way_to_the_answer(api, fields, most):
    answer = await api.chat.completions.create(**ask("Ponder", **fields))
    message = answer.choices[0].message
    assert message.content.startswith("Forty-two.")
    reasoning = getattr(message, "reasoning_content", "")
    assert most - 8 <= len(reasoning) <= most
    assert ("hm " * 200).startswith(reasoning)


async def test_a_stop_string_in_the_reasoning_does_not_end_the_answer(api):
    answer = await api.chat.completions.create(**ask("Hello", stop=["greet", "va"]))
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("A greeting.", "Good day, ça ")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == "va"


async def test_a_model_whose_template_opens_no_block_may_open_one_itself(serve_engine):
    template = TEMPLATE.replace("'<think>\\n' if", "'' if")
    script = {"Hello": "<think>\nA greeting.\n</think>\n\nGood day."}
    async with serve_engine(scripted_engine(script, template=template)) as api:
        message = (await api.chat.completions.create(**ask("Hello"))).choices[0].message
        assert (message.reasoning_content, message.content) == ("A greeting.", "Good day.")


# Logprobs


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_logprobs_are_those_of_the_content(api, is_streamed):
    asked = ask("Hello", logprobs=True, top_logprobs=1)
    if is_streamed:
        chunks = await pieces(api, **asked)
        found = []
        for chunk in chunks:
            for choice in chunk.choices:
                items = choice.logprobs.content if choice.logprobs else []
                found += items
                said = b"".join(bytes(item.bytes) for item in items).decode("utf-8", "replace")
                assert said.replace("\ufffd", "") in (choice.delta.content or "") or not said
    else:
        found = (await api.chat.completions.create(**asked)).choices[0].logprobs.content
    assert b"".join(bytes(item.bytes) for item in found).decode() == "Good day, ça va?"
    assert all(item.top_logprobs[0].token == item.token for item in found)


async def test_logprobs_beside_calls_are_those_of_the_text_before_them(api):
    answer = await api.chat.completions.create(**ask("Weather?", tools=[WEATHER], logprobs=True))
    found = answer.choices[0].logprobs.content
    assert b"".join(bytes(item.bytes) for item in found).decode() == answer.choices[0].message.content
    assert answer.choices[0].message.content == "Let me see."


# Tools


async def test_a_call_comes_with_its_arguments_and_the_text_before_it(api):
    answer = await api.chat.completions.create(**ask("Weather?", tools=[WEATHER]))
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"town": "Århus", "days": 2}
    assert call.id.startswith("call_")


async def test_streamed_calls_assemble_to_the_same(api):
    chunks = await pieces(api, **ask("Both?", tools=[WEATHER, CLOCK]))
    (first, second) = calls_of(chunks)
    assert (first[0], json.loads(first[1])) == ("weather", {"town": "Århus", "days": 2})
    assert (second[0], json.loads(second[1])) == ("clock", {})
    assert chunks[-2].choices[0].finish_reason == "tool_calls"
    assert texts(chunks, "content") == ""


async def test_an_answer_of_calls_alone_has_no_content(api):
    message = (await api.chat.completions.create(**ask("Both?", tools=[WEATHER, CLOCK]))).choices[0].message
    assert message.content is None
    assert [call.function.name for call in message.tool_calls] == ["weather", "clock"]
    assert len({call.id for call in message.tool_calls}) == 2


async def test_without_parallel_calls_there_is_one(api):
    asked = ask("Both?", tools=[WEATHER, CLOCK], parallel_tool_calls=False)
    (call,) = (await api.chat.completions.create(**asked)).choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert [name for name, _ in calls_of(await pieces(api, **asked))] == ["weather"]


async def test_several_choices_call_each_for_itself(api):
    answer = await api.chat.completions.create(**ask("Weather?", tools=[WEATHER], n=3))
    assert [choice.finish_reason for choice in answer.choices] == ["tool_calls"] * 3
    assert len({choice.message.tool_calls[0].id for choice in answer.choices}) == 3
    chunks = await pieces(api, **ask("Weather?", tools=[WEATHER], n=2))
    assert [texts(chunks, "content", index) for index in (0, 1)] == ["Let me see."] * 2


async def test_text_that_looks_like_a_call_is_text_where_there_are_no_tools(api):
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": [WEATHER]}):
        answer = await api.chat.completions.create(**ask("Show me", **fields))
        assert answer.choices[0].message.content == "Text like <tool_call> is no call."
        assert answer.choices[0].message.tool_calls is None
    answer = await api.chat.completions.create(**ask("Weather?", tools=[WEATHER], tool_choice="none"))
    assert answer.choices[0].message.content == f"Let me see.\n{SUNNY}"
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "clock"}}])
async def test_a_forced_call_is_made_whatever_the_model_would_say(api, choice):
    asked = ask("Hello", tools=[SWITCH, CLOCK], tool_choice=choice)
    for message in (
        (await api.chat.completions.create(**asked)).choices[0].message,
        (await api.chat.completions.create(**asked, reasoning_effort="none")).choices[0].message,
    ):
        assert message.content is None
        assert message.tool_calls
        for call in message.tool_calls:
            assert isinstance(json.loads(call.function.arguments), dict)
            assert choice == "required" or call.function.name == "clock"


async def test_a_call_that_is_cut_off_ends_with_length(api):
    answer = await api.chat.completions.create(
        **ask("Weather?", tools=[WEATHER], max_tokens=60, reasoning_effort="none")
    )
    assert answer.choices[0].finish_reason == "length"


async def test_the_result_of_a_tool_is_answered(api):
    messages: list[Any] = [{"role": "user", "content": "Weather?"}]
    first = await api.chat.completions.create(**ask("", messages=messages, tools=[WEATHER]))
    message = first.choices[0].message
    messages += [
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sun"},
    ]
    second = await api.chat.completions.create(**ask("", messages=messages, tools=[WEATHER]))
    assert second.choices[0].message.content == "Two sunny days."


# Formats


async def test_an_answer_follows_a_schema_after_its_reasoning(api):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "size": {"enum": ["big", "small"]}},
        "required": ["name", "size"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "town", "schema": schema, "strict": True}}
    for text in ("Town?", "Hello"):
        answer = await api.chat.completions.create(**ask(text, response_format=wanted))
        found = json.loads(answer.choices[0].message.content)
        assert set(found) == {"name", "size"}
        assert found["size"] in ("big", "small")
    assert answer.choices[0].message.reasoning_content == "A greeting."


async def test_formats_of_other_kinds_are_followed(api):
    answer = await api.chat.completions.create(**ask("Town?", response_format={"type": "json_object"}))
    assert json.loads(answer.choices[0].message.content)["size"] == "big"
    for wanted in (
        {"type": "regex", "regex": "(yes|no), thank you"},
        {"type": "grammar", "grammar": 'start: ("yes" | "no") ", thank you"'},
    ):
        answer = await api.chat.completions.create(**ask("Hello", extra_body={"response_format": wanted}))
        assert answer.choices[0].message.content in ("yes, thank you", "no, thank you")


async def test_a_schema_beside_tools_leaves_the_choice_between_both(api):
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "town", "schema": schema}}
    asked = {"tools": [WEATHER, CLOCK], "response_format": wanted}
    answer = await api.chat.completions.create(**ask("Town?", **asked))
    assert json.loads(answer.choices[0].message.content)["name"] == "Århus"
    answer = await api.chat.completions.create(**ask("Both?", **asked))
    assert answer.choices[0].finish_reason == "tool_calls"


# Refusals


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "wat"}}}},
         "response_format"),
        ({"tools": [BROKEN], "tool_choice": "required"}, "tools"),
        ({"response_format": {"type": "regex", "regex": "("}}, "response_format"),
        ({"response_format": {"type": "regex"}}, "response_format.regex"),
        ({"response_format": {"type": "regex", "regex": "a"}, "tools": [WEATHER]}, "response_format"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"extra_body": {"thinking_budget": -1}}, "thinking_budget"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
         "messages[0].content[0]"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_streamed", [True, False])
async def test_what_cannot_be_honoured_is_refused_by_name(api, fields, param, is_streamed):
    with pytest.raises(openai.BadRequestError) as refused:
        await api.chat.completions.create(**ask("Hello", **fields), stream=is_streamed)
    assert refused.value.param == param
    assert param.split("[")[0].split(".")[0] in refused.value.body["message"]


async def test_tools_are_refused_by_a_model_that_knows_none(serve_engine):
    plain = "{% for message in messages %}{{ message.content }}{% endfor %}"
    async with serve_engine(scripted_engine(SCRIPT, template=plain)) as api:
        with pytest.raises(openai.BadRequestError, match="tools") as refused:
            await api.chat.completions.create(**ask("Hello", tools=[WEATHER]))
        assert refused.value.param == "tools"


# Helpers of the package


class Town(pydantic.BaseModel):
    name: str
    size: Literal["big", "small"]


async def test_the_parse_helper_gets_an_object(api):
    answer = await api.chat.completions.parse(**ask("Town?"), response_format=Town)
    assert answer.choices[0].message.parsed == Town(name="Århus", size="big")


async def test_the_parse_helper_gets_arguments(api):
    class Weather(pydantic.BaseModel):
        town: str
        days: int

    tool = openai.pydantic_function_tool(Weather, name="weather")
    answer = await api.chat.completions.parse(**ask("Weather?"), tools=[tool])
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.parsed_arguments == Weather(town="Århus", days=2)


async def test_the_stream_helper_sees_arguments_grow_and_the_final_message(api):
    seen = []
    async with api.chat.completions.stream(**ask("Weather?", tools=[WEATHER])) as stream:
        async for event in stream:
            seen.append(event.type)
        final = await stream.get_final_completion()
    assert "content.delta" in seen
    assert "tool_calls.function.arguments.delta" in seen
    assert seen.count("tool_calls.function.arguments.done") == 1
    assert json.loads(final.choices[0].message.tool_calls[0].function.arguments)["days"] == 2


async def test_the_synchronous_client_is_content_too(api):
    def work() -> tuple[Any, str]:
        with openai.OpenAI(base_url=str(api.base_url), api_key="-", max_retries=0) as client:
            parsed = client.chat.completions.parse(**ask("Town?"), response_format=Town)
            with client.chat.completions.stream(**ask("Hello")) as stream:
                said = "".join(event.delta for event in stream if event.type == "content.delta")
            return parsed.choices[0].message.parsed, said

    assert await asyncio.to_thread(work) == (Town(name="Århus", size="big"), "Good day, ça va?")
