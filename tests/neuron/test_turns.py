"""Kept turns: what is found again, what is forgotten, and that prompts of conversations stay as they were."""

import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.neuron.config import StateCacheSection
from helexa.neuron.turns import TurnStore, conversation_keys, next_key
from helexa.wire.chat import AnswerMessage, FunctionCall, Message, ToolCall
from support.scripted_engine import TEMPLATE, scripted_engine

THOUGHT = "Let me think about this for a while. " * 8
SCRIPT = {f"Question {number}": f"{THOUGHT}\n</think>\n\nAnswer {number}." for number in range(9)}
CALL = '<tool_call>\n{"name": "look", "arguments": {"depth": 1.0, "at": "the sky"}}\n</tool_call>'
SCRIPT |= {
    "Look!": f"{THOUGHT}\n</think>\n\nI look.\n{CALL}",
    "<tool_response>\nclouds\n</tool_response>": f"More.\n</think>\n\n{CALL}",
    "<tool_response>\nstars\n</tool_response>": f"{THOUGHT}\n</think>\n\nStars.",
}
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"depth": {"type": "number"}, "at": {"type": "string"}},
        },
    },
}


class Conversation:
    """A client that keeps what most clients keep: role, content and calls, but no reasoning."""

    def __init__(self, api, **fields: Any):
        self.api, self.fields = api, fields
        self.messages: list[dict[str, Any]] = []
        self.usages: list[Any] = []

    async def say(self, text: str, role: str = "user", **fields: Any) -> Any:
        """Appends a message, and the answer to it as a client would write it down."""
        message = {"role": role, "content": text}
        if role == "tool":
            message["tool_call_id"] = "x"
        self.messages.append(message)
        answer = await self.api.chat.completions.create(
            model="m", messages=self.messages, temperature=0, **{"max_tokens": 2000} | self.fields | fields
        )
        self.usages.append(answer.usage)
        said = answer.choices[0].message
        kept: dict[str, Any] = {"role": "assistant", "content": (said.content or "") + " \n"}
        if said.tool_calls:
            kept["tool_calls"] = [
                {"id": f"their-{index}", "type": "function", "function": {
                    "name": call.function.name,
                    "arguments": json.dumps(json.loads(call.function.arguments), sort_keys=True, indent=1)}}
                for index, call in enumerate(said.tool_calls)
            ]  # fmt: skip
        self.messages.append(kept)
        return said

    def assert_reuses_all(self, turn: int = -1, before: int = -2) -> None:
        """The prompt of one turn was cached up to the end of an earlier one, but for its last tokens."""
        earlier, usage = self.usages[before], self.usages[turn]
        assert usage.prompt_tokens_details.cached_tokens >= earlier.total_tokens - 2
        assert usage.prompt_tokens > earlier.total_tokens


async def metrics(api) -> dict[str, float]:
    """The neuron's metrics by name, without their labels."""
    async with httpx.AsyncClient(base_url=base(api), trust_env=False) as http:
        lines = (await http.get("/metrics")).text.splitlines()
    rows = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name.partition("{")[0]: float(value) for name, _, value in rows}


@pytest.fixture
async def api(serve_engine):
    async with serve_engine(scripted_engine(SCRIPT)) as client:
        yield client


# Conversations


async def test_a_conversation_goes_on_after_a_restart_with_all_its_reasoning(serve_engine, tmp_path):
    def load(store):
        return scripted_engine(SCRIPT, store=store)

    kept = StateCacheSection(path=str(tmp_path / "states"))
    async with serve_engine(load, kept) as api:
        chat = Conversation(api)
        for number in range(2):
            await chat.say(f"Question {number}")
    async with serve_engine(load, kept) as chat.api:
        await chat.say("Question 2")
        chat.assert_reuses_all()
        values = await metrics(chat.api)
        cached = chat.usages[-1].prompt_tokens_details.cached_tokens
        assert values["helexa_neuron_stored_prompt_tokens_total"] == cached
        assert values["helexa_neuron_state_store_entries"] > 0
        assert values["helexa_neuron_state_store_disk_bytes"] > 0
        assert values["helexa_neuron_state_store_damaged_total"] == 0
    async with serve_engine(load) as api:  # which knows nothing of it
        usages = [*chat.usages]
        chat.api = api
        await chat.say("Question 3")
        assert chat.usages[-1].prompt_tokens_details.cached_tokens == 0
        assert chat.usages[-1].prompt_tokens < usages[-1].prompt_tokens  # its template drops the reasoning


async def test_a_conversation_goes_on_from_the_exact_tokens_of_its_answers(api):
    talk = Conversation(api)
    for number in range(4):
        assert (await talk.say(f"Question {number}")).content == f"Answer {number}."
        if number:
            talk.assert_reuses_all()


async def test_without_kept_turns_reasoning_that_is_dropped_ends_the_cached_prefix(serve_engine):
    async with serve_engine(scripted_engine(SCRIPT), reuse_turns=False) as api:
        talk = Conversation(api)
        await talk.say("Question 1")
        await talk.say("Question 2")
        first, second = talk.usages
        assert second.prompt_tokens_details.cached_tokens < first.prompt_tokens + 16
        assert second.prompt_tokens < first.total_tokens


async def test_an_edited_question_goes_on_from_the_turn_before(api):
    talk = Conversation(api)
    for number in range(3):
        await talk.say(f"Question {number}")
    talk.messages = talk.messages[:4]
    assert (await talk.say("Question 5")).content == "Answer 5."
    talk.assert_reuses_all(-1, 1)


async def test_an_edited_answer_is_believed(api):
    talk = Conversation(api)
    for number in range(3):
        await talk.say(f"Question {number}")
    talk.messages[3]["content"] = "Something else."
    await talk.say("Question 4")
    prompt = await tokens(api, talk.messages[:-1])
    assert "Something else." in prompt
    assert prompt.count("</think>") == 1  # that of the first turn, which stands as it was
    talk.assert_reuses_all(-1, 0)


async def test_conversations_that_take_turns_do_not_disturb_each_other(api):
    one, other = Conversation(api), Conversation(api, extra_body={"chat_template_kwargs": {"mood": "good"}})
    for number in range(3):
        await one.say(f"Question {number}")
        await other.say(f"Question {number + 3}")
    for talk in (one, other):
        talk.assert_reuses_all(1, 0)
        talk.assert_reuses_all(2, 1)


async def test_a_loop_of_tools_goes_on_from_what_was_called(api):
    talk = Conversation(api, tools=[LOOK])
    await talk.say("Look!")
    for result in ("clouds", "clouds", "stars"):
        said = await talk.say(result, role="tool")
        talk.assert_reuses_all()
    assert said.content == "Stars."
    await talk.say("Question 1")
    talk.assert_reuses_all()


async def test_streamed_answers_are_kept_too(api):
    messages = [{"role": "user", "content": "Question 1"}]
    stream = await api.chat.completions.create(
        model="m", messages=messages, stream=True, temperature=0, stream_options={"include_usage": True}
    )
    usage = [chunk.usage async for chunk in stream][-1]
    messages += [{"role": "assistant", "content": "Answer 1."}, {"role": "user", "content": "Question 2"}]
    answer = await api.chat.completions.create(model="m", messages=messages, temperature=0)
    assert answer.usage.prompt_tokens_details.cached_tokens >= usage.total_tokens - 2


async def test_a_continued_prompt_is_counted_as_it_is_used(api):
    talk = Conversation(api)
    await talk.say("Question 1")
    await talk.say("Question 2")
    assert len(await tokens(api, talk.messages[:3])) > 0
    async with httpx.AsyncClient(trust_env=False) as http:
        body = {"model": "m", "messages": talk.messages[:3]}
        counted = (await http.post(f"{base(api)}/tokenize", json=body)).json()["count"]
    assert counted == talk.usages[1].prompt_tokens


async def test_nobody_continues_the_turns_of_another(api):
    talk = Conversation(api, extra_headers={"x-helexa-principal": "anna"})
    await talk.say("Question 1")
    messages = [*talk.messages, {"role": "user", "content": "Question 2"}]
    assert "think about" in await tokens(api, messages, {"x-helexa-principal": "anna"})
    for headers in ({"x-helexa-principal": "bert"}, {}):
        assert "think about" not in await tokens(api, messages, headers)


async def test_an_answer_that_a_stop_string_cut_is_not_continued(api):
    talk = Conversation(api)
    assert (await talk.say("Question 1", stop="swer")).content == "An"
    messages = [*talk.messages, {"role": "user", "content": "Question 2"}]
    assert "think about" not in await tokens(api, messages)


@pytest.mark.parametrize(
    "content",
    ["message.content | upper", "message.content + message.content", "message.content[:6]"],
)
async def test_a_template_that_rewrites_answers_is_rendered_as_it_stands(serve_engine, content):
    template = TEMPLATE.replace("message.content.strip()", content)
    async with serve_engine(scripted_engine(SCRIPT, template=template)) as api:
        talk = Conversation(api)
        await talk.say("Question 1")
        assert (await talk.say("Question 2")).content == "Answer 2."
        assert "think about" not in await tokens(api, talk.messages[:3])


async def test_a_conversation_that_only_fits_without_its_reasoning_is_rendered_anew(serve_engine):
    async with serve_engine(scripted_engine(SCRIPT, max_context=768)) as api:
        talk = Conversation(api)
        await talk.say("Question 1")
        short = [*talk.messages[:2], {"role": "user", "content": "x"}]
        long = [*talk.messages[:2], {"role": "user", "content": "x" * 500}]
        assert "think about" in await tokens(api, short)
        assert "think about" not in await tokens(api, long)


def base(api) -> str:
    return str(api.base_url).rstrip("/").removesuffix("/v1")


async def tokens(api, messages: list[Any], headers: dict[str, str] | None = None) -> str:
    """The prompt that these messages make, as text."""
    async with httpx.AsyncClient(base_url=base(api), trust_env=False) as http:
        found = (
            await http.post("/tokenize", json={"model": "m", "messages": messages}, headers=headers)
        ).json()
        told = await http.post("/detokenize", json={"model": "m", "tokens": found["tokens"]})
        return str(told.json()["prompt"])


# Keys


def call(arguments: Any) -> ToolCall:
    return ToolCall(FunctionCall("f", arguments), "id")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Message("assistant", " hi\n"), Message("assistant", "hi")),
        (Message("assistant", None), Message("assistant", "")),
        (Message("assistant", "hi", reasoning_content="x"), Message("assistant", "hi")),
        (Message("assistant", tool_calls=[call('{"a": 1.0, "b": [2]}')]),
         Message("assistant", "", tool_calls=[ToolCall(FunctionCall("f", '{"b":[2],"a":1}'), "other")])),
        (Message("assistant", tool_calls=[call({"a": "é"})]),
         Message("assistant", tool_calls=[call('{"a": "\\u00e9"}')])),
        (Message("assistant", tool_calls=[call("")]), Message("assistant", tool_calls=[call("{}")])),
        (Message("assistant", "hi"), AnswerMessage("hi")),
    ],
)  # fmt: skip
def test_the_same_message_in_other_words_has_the_same_key(one, other):
    assert next_key(b"k", one) == next_key(b"k", other)


def test_what_differs_in_meaning_differs_in_key():
    messages = [
        Message("user", "hi"),
        Message("user", "Hi"),
        Message("user", "hi", name="Ada"),
        Message("assistant", "hi"),
        Message("assistant", "hi", tool_calls=[call("{}")]),
        Message("assistant", "hi", tool_calls=[call('{"a": 1}')]),
        Message("assistant", "hi", tool_calls=[call('{"a": "1"}')]),
        Message("assistant", "hi", tool_calls=[call('{"a": true}')]),
        Message("assistant", "hi", tool_calls=[call('{"a": 1'), call("{}")]),
    ]
    assert len({next_key(b"k", message) for message in messages}) == len(messages)
    two = [Message("user", "a"), Message("user", "b")]
    assert (
        len({*conversation_keys("r", two), *conversation_keys("s", two), *conversation_keys("r", two[::-1])})
        == 6
    )


# The store


def test_a_turn_has_the_tokens_of_all_turns_before_it():
    store = TurnStore(10_000)
    store.keep(b"a", None, [1, 2])
    store.keep(b"b", store.find([b"a"]), [3])
    turn = store.find([b"c", b"b", b"a"])
    assert turn.key == b"b"
    assert turn.token_ids == [1, 2, 3]
    assert turn.num_tokens == 3
    assert store.find([b"c"]) is None


def test_the_turns_not_used_for_longest_are_forgotten_first():
    store = TurnStore(3 * (256 + 400))
    for key in (b"a", b"b", b"c"):
        store.keep(key, None, [7] * 100)
    store.find([b"a"])
    store.keep(b"d", None, [7] * 100)
    assert [store.find([key]) is not None for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]


def test_a_turn_larger_than_the_store_is_not_kept():
    store = TurnStore(1000)
    store.keep(b"a", None, [1] * 1000)
    assert (len(store), store.nbytes) == (0, 0)


def test_turns_that_were_replaced_take_room_while_others_go_on_from_them():
    store = TurnStore(1_000_000)
    for number in range(5):
        store.keep(b"first", None, [number] * 1000)
        store.keep(bytes([number]), store.find([b"first"]), [number])
    held = {turn for number in range(5) for turn in store.find([bytes([number])]).line()}
    assert len(held) == 10
    assert store.nbytes == sum(turn.nbytes for turn in held)
    store.max_bytes = 5000
    store.keep(b"last", None, [1])
    assert store.nbytes <= 5000
    assert store.find([bytes([0])]) is None


def test_a_turn_that_was_forgotten_takes_room_again_with_one_that_goes_on_from_it():
    store = TurnStore(3000)
    store.keep(b"a", None, [1] * 300)
    parent = store.find([b"a"])
    store.keep(b"b", None, [2] * 500)
    assert store.find([b"a"]) is None
    store.keep(b"c", parent, [3])
    assert store.find([b"c"]).token_ids == [1] * 300 + [3]
    assert store.nbytes == sum(turn.nbytes for turn in store.find([b"c"]).line())


def key_of(number):
    return bytes([number + 1] * 20)


@given(steps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 60)), max_size=30))
def test_what_was_dumped_is_restored_token_for_token(steps):
    store, restored = TurnStore(10**6), TurnStore(10**6)
    for name, parent, size in steps:
        store.keep(key_of(name), store.find([key_of(parent)]), [name] * size)
    restored.restore(store.dump())
    assert len(restored) == len(store)
    for name in range(6):
        turn, again = store.find([key_of(name)]), restored.find([key_of(name)])
        assert (turn is None) == (again is None)
        assert turn is None or again.token_ids == turn.token_ids


@given(steps=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11), st.integers(0, 60)), max_size=60))
def test_the_store_keeps_its_bound_whatever_is_put_into_it(steps):
    store = TurnStore(4 * 300)
    for name, parent_name, size in steps:
        parent = store.find([bytes([parent_name])])
        expected = [*(parent.token_ids if parent else []), *[name] * size]
        store.keep(bytes([name]), parent, [name] * size)
        assert 0 <= store.nbytes <= store.max_bytes
        if turn := store.find([bytes([name])]):
            assert turn.token_ids == expected
