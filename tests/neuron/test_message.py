"""Messages read from deltas, without an engine: however tokens and texts are cut, the message is the same."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.engine.output import OutputFormat, ThinkMarkers
from helexa.engine.stream import Delta, TokenLogprob
from helexa.neuron.message import MessageReader
from support.scripted_engine import tokenizer

WORDS = tokenizer()
FORMAT = OutputFormat(ThinkMarkers("<think>", "</think>"), "hermes", True)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
TEXT = (
    "<think>\nthe <answer> is: te</think>\n\nthe <answer>, ça va? 日本\n"
    '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
)
CONTENT = "the <answer>, ça va? 日本"


def reader(**keywords) -> MessageReader:
    return MessageReader(WORDS, FORMAT.parser(tools=TOOLS), **keywords)


def deltas(text: str, cuts: list[int], lags: list[int], reason: str = "stop") -> list[Delta]:
    """`text` in deltas of several tokens, with texts that lag behind by some characters."""
    token_ids = WORDS.encode(text)
    ends = [0, *sorted(min(cut, len(token_ids)) for cut in cuts), len(token_ids)]
    made, sent = [], 0
    for number, (start, end) in enumerate(pairwise(ends)):
        known = WORDS.decode(token_ids[:end]).rstrip("\ufffd")
        upto = max(sent, len(known) - (lags[number % len(lags)] if lags else 0))
        is_last = number == len(ends) - 2
        piece = text[sent:] if is_last else text[sent:upto]
        sent = upto
        logprobs = [TokenLogprob(token_ids[place], -float(place), []) for place in range(start, end)]
        made.append(Delta(piece, token_ids[start:end], logprobs, reason if is_last else None))
    return made


@given(cuts=st.lists(st.integers(0, 200), max_size=40), lags=st.lists(st.integers(0, 9), max_size=4))
def test_the_message_and_its_logprobs_do_not_depend_on_the_cuts(cuts, lags):
    reading = reader()
    parts = [part for delta in deltas(TEXT, cuts, lags) for part in reading.feed(delta)]
    message = reading.message()
    assert (message.reasoning_content, message.content) == ("the <answer> is: te", CONTENT)
    assert [call.function.arguments for call in message.tool_calls] == ['{"a": "é"}', "{}"]
    assert reading.finish_reason == "tool_calls"
    said = b"".join(WORDS.token_bytes(item.token_id) for item in reading.logprobs)
    assert said.decode() == CONTENT
    before = len(WORDS.encode(TEXT.partition(CONTENT)[0]))
    assert [-item.logprob for item in reading.logprobs] == [before + place for place in range(len(said))]
    assert [item for part in parts for item in part.logprobs or ()] == reading.logprobs
    assert "".join(part.delta.content or "" for part in parts) == CONTENT


def test_all_of_a_plain_answer_is_content():
    reading = MessageReader(WORDS)
    for delta in deltas(TEXT, [5, 9], []):
        reading.feed(delta)
    assert reading.message().content == TEXT
    assert len(reading.logprobs) == len(WORDS.encode(TEXT))


@pytest.mark.parametrize("make", [reader, lambda: MessageReader(WORDS)])
def test_tokens_of_a_stop_string_have_no_logprobs_and_those_of_broken_characters_do(make):
    token_ids = WORDS.encode("añENDé")
    reading = make()
    logprobs = [TokenLogprob(token_id, -1.0, []) for token_id in token_ids]
    reading.feed(Delta("a", token_ids[:2], logprobs[:2]))
    reading.feed(Delta("ñ", token_ids[2:5], logprobs[2:5]))
    reading.feed(Delta("", token_ids[5:6], logprobs[5:6], "stop", stop="END"))
    assert [item.token_id for item in reading.logprobs] == WORDS.encode("añ")
    reading = make()
    reading.feed(Delta("a\ufffd", token_ids[:2], logprobs[:2], "length"))
    assert [item.token_id for item in reading.logprobs] == token_ids[:2]


def test_reasoning_that_begins_like_the_answer_does_not_get_its_logprobs():
    reading = MessageReader(WORDS, FORMAT.parser(prompt_tail="<think>\n"))
    for delta in deltas("yes or no?\n</think>\n\nyes", list(range(20)), []):
        reading.feed(delta)
    assert reading.message().content == "yes"
    first = len(WORDS.encode("yes or no?\n</think>\n\n"))
    assert [-item.logprob for item in reading.logprobs] == [first, first + 1, first + 2]


def test_who_asked_for_logprobs_gets_some_or_an_empty_list():
    reading = reader()
    reading.feed(Delta("<think>", WORDS.encode("<think>"), [TokenLogprob(1, -1.0, [])], "stop"))
    assert reading.logprobs == []
    reading = reader()
    reading.feed(Delta("hi", WORDS.encode("hi"), None, "stop"))
    assert reading.logprobs is None


@pytest.mark.parametrize(
    ("text", "reason", "is_faithful"),
    [
        (TEXT, "stop", True),
        ("<think>\nhm\n</think>\n\nhi", "length", True),
        ("<think>\nhm", "length", False),
        ('<tool_call>\n{"name": "f", "arguments": {"a": "x', "length", False),
        ("hi", "stop", True),
    ],
)
def test_only_what_a_message_says_in_full_may_be_continued(text, reason, is_faithful):
    reading = reader()
    for delta in deltas(text, [3], [], reason):
        reading.feed(delta)
    assert reading.is_faithful is is_faithful


def test_calls_beyond_the_allowed_are_left_out_and_then_nothing_may_be_continued():
    reading = reader(max_calls=1)
    parts = [part for delta in deltas(TEXT, [], []) for part in reading.feed(delta)]
    assert len(reading.message().tool_calls) == 1
    assert {call.index for part in parts for call in part.delta.tool_calls or ()} == {0}
    assert not reading.is_faithful


def test_a_message_that_is_not_finished_may_not_be_continued():
    reading = reader()
    reading.feed(Delta("hi", WORDS.encode("hi")))
    assert not reading.is_faithful


def test_a_call_that_a_stop_string_cuts_is_no_call_to_be_made():
    reading = reader()
    for delta in deltas('<tool_call>\n{"name": "f", "arguments": {"a": "x', [3], []):
        last = delta.finish_reason is not None
        reading.feed(replace(delta, stop="y") if last else delta)
    assert (reading.finish_reason, reading.stop) == ("stop", "y")
    assert not reading.is_faithful
    with pytest.raises(ValueError, match="Unterminated"):
        json.loads(reading.message().tool_calls[0].function.arguments)
