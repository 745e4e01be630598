import json
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.errors import UpstreamClosed, UpstreamError
from helexa.wire import sse
from helexa.wire.anthropic import CountTranslator, MessagesTranslator, parse_messages

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
USAGE = {
    "prompt_tokens": 30,
    "completion_tokens": 9,
    "total_tokens": 39,
    "prompt_tokens_details": {"cached_tokens": 12},
    "completion_tokens_details": {"reasoning_tokens": 4},
}
TOLD_USAGE = {
    "input_tokens": 18,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 12,
    "output_tokens": 9,
    "output_tokens_details": {"thinking_tokens": 4},
}


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def translator(clock):
    return MessagesTranslator("m", 100, clock=clock)


def chunk(delta=None, finish=None, **more):
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish, **more}]
    return sse.encode({**HEAD, "choices": choices})


def call(index, name=None, arguments=None, call_id=None):
    head = {"id": call_id or f"call_{index}", "type": "function"} if name else {}
    function = {"name": name, "arguments": ""} if name else {"arguments": arguments}
    return {"tool_calls": [{"index": index, **head, "function": function}]}


def usage(**more):
    return sse.encode({**HEAD, "choices": [], "usage": {**USAGE, **more}})


def events(stream):
    """The events; each is checked to bear the name of its type."""
    found = []
    for event in sse.Parser().feed(stream):
        data = json.loads(event.data)
        assert data["type"] == event.name
        found.append(data)
    return found


def accumulate(stream):
    """The message that a client makes of the events; it insists on their order, as clients do."""
    message, open_block, texts = {}, None, {}
    for event in events(stream):
        kind = event["type"]
        if kind == "ping":
            continue
        if kind == "message_start":
            assert not message
            message = event["message"]
        elif kind == "content_block_start":
            assert open_block is None
            open_block = event["index"]
            assert open_block == len(message["content"])
            message["content"].append(event["content_block"])
            texts[open_block] = ""
        elif kind == "content_block_delta":
            assert event["index"] == open_block
            delta = dict(event["delta"])
            block = message["content"][open_block]
            assert (
                delta.pop("type")
                == {
                    **{"text": "text_delta", "tool_use": "input_json_delta"},
                    "thinking": "signature_delta" if "signature" in delta else "thinking_delta",
                }[block["type"]]
            )
            (name, value), *_ = delta.items()
            if name == "partial_json":
                texts[open_block] += value
            else:
                block[name] += value
        elif kind == "content_block_stop":
            assert event["index"] == open_block
            if message["content"][open_block]["type"] == "tool_use":
                message["content"][open_block]["input"] = json.loads(texts[open_block] or "{}")
            open_block = None
        elif kind == "message_delta":
            message |= event["delta"]
            message["usage"] |= event["usage"]
        else:
            assert kind == "message_stop"
            assert open_block is None
    return message


def told(translator, *chunks):
    found = b"".join(map(translator.feed, [*chunks, sse.DONE]))
    return found + translator.finish()


def types(stream):
    return [event["type"] for event in events(stream)]


def cut(text, sizes):
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [piece for piece in (*pieces, text) if piece]


CALLS = st.lists(
    st.tuples(
        st.sampled_from(["look", "Bash"]),
        st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9), max_size=3),
    ),
    max_size=3,
)
SIZES = st.lists(st.integers(1, 7), max_size=8)
TEXTS = st.text(st.sampled_from(" \nabü€😀<"), max_size=30)


@given(TEXTS, TEXTS, CALLS, SIZES, st.booleans())
def test_a_stream_and_a_whole_answer_say_the_same(reasoning, text, calls, sizes, omits_thinking):
    chunks = [chunk({"role": "assistant", "content": ""})]
    chunks += [chunk({"reasoning_content": piece}) for piece in cut(reasoning, sizes)]
    chunks += [chunk({"content": piece}) for piece in cut(text, sizes)]
    for index, (name, arguments) in enumerate(calls):
        chunks.append(chunk(call(index, name)))
        chunks += [chunk(call(index, arguments=piece)) for piece in cut(json.dumps(arguments), sizes)]
    finish = "tool_calls" if calls else "stop"
    chunks += [chunk({}, finish), usage()]
    streamed = accumulate(told(MessagesTranslator("m", 100, omits_thinking=omits_thinking), *chunks))
    message = {"role": "assistant", "content": text or None, "reasoning_content": reasoning or None}
    message["tool_calls"] = [
        {
            "id": f"call_{i}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        for i, (name, arguments) in enumerate(calls)
    ] or None
    body = {**HEAD, "choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": USAGE}
    whole = json.loads(
        MessagesTranslator("m", 100, omits_thinking=omits_thinking).whole(json.dumps(body).encode())
    )
    assert streamed.pop("id") != whole.pop("id")
    assert streamed == whole
    assert whole["usage"] == TOLD_USAGE
    for block in whole["content"]:
        assert block["type"] != "text" or block["text"].strip()


def test_the_events_of_an_answer_in_their_order(translator):
    stream = told(
        translator,
        chunk({"role": "assistant", "content": ""}),
        chunk({"reasoning_content": "Hm."}),
        chunk({"content": "\n\n"}),
        chunk({"content": "Yes"}),
        chunk(call(0, "look")),
        chunk(call(0, arguments="{}")),
        chunk(call(1, "look")),
        chunk({}, "tool_calls"),
        usage(),
    )
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert types(stream) == [
        *("message_start", "ping", "content_block_start", "content_block_delta", "content_block_delta"),
        *("content_block_stop", *block, *block, "content_block_start", "content_block_stop"),
        *("message_delta", "message_stop"),
    ]
    said = accumulate(stream)
    assert [item["type"] for item in said["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    assert said["content"][1]["text"] == "\n\nYes"
    assert said["content"][3] == {"type": "tool_use", "id": "call_1", "name": "look", "input": {}}


def test_what_was_said_is_accepted_back(translator):
    answer = accumulate(
        told(
            translator,
            chunk({"reasoning_content": "Hm."}),
            chunk({"content": "Yes"}),
            chunk(call(0, "look")),
            chunk(call(0, arguments='{"a": 1}')),
            chunk({}, "tool_calls"),
        )
    )
    assert answer["content"][0]["signature"]
    result = {"type": "tool_result", "tool_use_id": "call_0", "content": "2"}
    body = {
        **{"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Well?"}]},
    }
    body["messages"] += [
        {"role": "assistant", "content": answer["content"]},
        {"role": "user", "content": [result]},
    ]
    chat = json.loads(parse_messages(json.dumps(body).encode()).to_chat())
    function = {"name": "look", "arguments": '{"a":1}'}
    assert chat["messages"][1:] == [
        {
            **{"role": "assistant", "content": "Yes", "reasoning_content": "Hm."},
            "tool_calls": [{"id": "call_0", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_0", "content": "2"},
    ]


@pytest.mark.parametrize("blank", ["", " ", "\n\n"])
def test_no_block_is_opened_for_white_space(translator, blank):
    stream = told(translator, chunk({"content": blank}), chunk({}, "stop"), usage())
    assert accumulate(stream)["content"] == []


def test_arguments_that_come_with_the_name_are_told(translator):
    delta = {"tool_calls": [{"index": 0, "function": {"name": "look", "arguments": '{"a": 1}'}}]}
    said = accumulate(told(translator, chunk(delta), chunk({}, "tool_calls")))["content"]
    assert said[0]["input"] == {"a": 1}
    assert said[0]["id"].startswith("toolu_")


@pytest.mark.parametrize(
    ("finish", "more", "reason", "sequence"),
    [
        ("stop", {}, "end_turn", None),
        ("stop", {"stop_reason": "END"}, "stop_sequence", "END"),
        ("stop", {"stop_reason": 151643}, "end_turn", None),
        ("content_filter", {}, "refusal", None),
        ("length", {}, "model_context_window_exceeded", None),
        (None, {}, "end_turn", None),
    ],
)
def test_stop_reasons(translator, finish, more, reason, sequence):
    stream = told(translator, chunk({"content": "a"}), chunk({}, finish, **more), usage())
    assert [event["delta"] for event in events(stream) if event["type"] == "message_delta"] == [
        {"stop_reason": reason, "stop_sequence": sequence}
    ]
    choice = {"index": 0, "message": {"content": "a"}, "finish_reason": finish, **more}
    whole = json.loads(translator.whole(json.dumps({"choices": [choice], "usage": USAGE}).encode()))
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)


def test_an_answer_that_has_used_its_max_tokens_says_so(translator):
    stream = told(translator, chunk({"content": "a"}), chunk({}, "length"), usage(completion_tokens=100))
    assert accumulate(stream)["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(
    ("finish", "reason"), [("stop", "tool_use"), ("length", "model_context_window_exceeded")]
)
def test_a_call_is_the_reason_unless_it_was_cut_off(translator, finish, reason):
    stream = told(translator, chunk(call(0, "look")), chunk({}, finish), usage())
    assert accumulate(stream)["stop_reason"] == reason


def test_the_reasoning_of_other_servers_is_known_by_its_name_there(translator):
    said = accumulate(
        told(translator, chunk({"reasoning": "Hm."}), chunk({"content": "Yes"}), chunk({}, "stop"))
    )
    assert [block["type"] for block in said["content"]] == ["thinking", "text"]


def test_a_whole_call_that_was_cut_off_has_no_input(translator):
    function = {"name": "look", "arguments": '{"a": "b'}
    message = {"content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}
    choice = {"index": 0, "message": message, "finish_reason": "length"}
    whole = json.loads(translator.whole(json.dumps({"choices": [choice]}).encode()))
    assert whole["content"] == [{"type": "tool_use", "id": "c", "name": "look", "input": {}}]


def test_thoughts_that_are_not_wanted_leave_their_signature(clock):
    translator = MessagesTranslator("m", 100, omits_thinking=True, clock=clock)
    stream = told(
        translator, chunk({"reasoning_content": "Hm."}), chunk({"content": "Yes"}), chunk({}, "stop")
    )
    thought, text = accumulate(stream)["content"]
    assert (thought["thinking"], text["text"]) == ("", "Yes")
    assert thought["signature"]


def test_long_thoughts_that_are_not_wanted_are_no_silence(clock):
    translator = MessagesTranslator("m", 100, omits_thinking=True, clock=clock)
    stream, told_s = translator.feed(chunk({"reasoning_content": "Hm."})), [clock.now]
    for _ in range(100):
        clock.now += 1
        if block := translator.feed(chunk({"reasoning_content": " Hm."})):
            told_s.append(clock.now)
            stream += block
    assert [later - earlier for earlier, later in pairwise(told_s)] == [20] * 5
    stream += told(translator, chunk({"content": "Yes"}), chunk({}, "stop"))
    assert [block.get("thinking") for block in accumulate(stream)["content"]] == ["", None]


def test_the_number_of_tokens_is_told_at_the_start_if_it_is_known(translator):
    assert translator.feed(b": prefill 10/30\n\n") == b": prefill 10/30\n\n"
    start = events(translator.feed(chunk({"content": "a"})))[0]
    assert start["message"]["usage"]["input_tokens"] == 30


def test_silence_is_at_first_filled_with_comments(translator, clock):
    clock.now += 9
    assert translator.keep_alive() == b": keep-alive\n\n"
    assert translator.feed(b": keep-alive\n\n: prefill 3/9\n\n") == b": keep-alive\n\n: prefill 3/9\n\n"


def test_longer_silence_has_pings_with_the_progress_and_now_and_then_an_event_that_is_no_ping(
    translator, clock
):
    seen, gaps, last_s = b"", [], clock.now
    for second in range(600):
        clock.now += 1
        block = translator.feed(b": prefill %d/600\n\n" % second)
        seen += block
        if set(types(block)) - {"ping"}:
            gaps.append(clock.now - last_s)
            last_s = clock.now
    assert max(gaps) <= 20
    assert len(gaps) == 30
    assert {"type": "ping", "progress": {"done": 50, "total": 600}} in events(seen)
    seen += told(
        translator, chunk({"reasoning_content": "Hm."}), chunk({"content": "Yes"}), chunk({}, "stop"), usage()
    )
    message = accumulate(seen)
    assert [block["type"] for block in message["content"]] == ["thinking", "text"]
    assert message["usage"] == TOLD_USAGE
    assert message["stop_reason"] == "end_turn"


@pytest.mark.parametrize(
    "delta",
    [{"reasoning_content": "Hm."}, {"content": "Yes"}, call(0, "look")],
    ids=["thinking", "text", "call"],
)
def test_silence_within_a_block_is_filled_with_empty_deltas_of_it(translator, clock, delta):
    stream = translator.feed(chunk(delta))
    for _ in range(50):
        clock.now += 1
        stream += translator.feed(b": keep-alive\n\n")
    assert types(stream)[-50:].count("content_block_delta") == 2
    plain = MessagesTranslator("m", 100)
    quiet = accumulate(told(plain, chunk(delta), chunk({}, "stop")))
    disturbed = accumulate(stream + told(translator, chunk({}, "stop")))
    assert {**disturbed, "id": 0} == {**quiet, "id": 0}


def test_the_wait_for_a_neuron_begins_the_message_once(translator, clock):
    stream = b""
    for _ in range(25):
        clock.now += 1
        stream += translator.keep_alive()
    stream += told(translator, chunk({"content": "a"}), chunk({}, "stop"))
    assert types(stream).count("message_start") == 1
    assert accumulate(stream)["content"] == [{"type": "text", "text": "a"}]


def test_a_failure_is_an_error_event_and_ends_the_stream(translator):
    translator.feed(chunk({"content": "a"}))
    assert events(translator.failure(UpstreamClosed("n0 closed the connection"))) == [
        {"type": "error", "error": {"type": "api_error", "message": "n0 closed the connection"}}
    ]
    assert translator.finish() == b""


def test_an_error_of_the_neuron_within_its_stream_is_told_once(translator):
    members = {"message": "the queue is full", "type": "rate_limit_error", "code": "rate_limit_exceeded"}
    stream = translator.feed(chunk({"content": "a"}) + sse.encode({"error": members}) + chunk({}, "error"))
    stream += translator.feed(sse.DONE) + translator.finish()
    assert types(stream)[-1] == "error"
    assert types(stream).count("error") == 1
    assert "message_stop" not in types(stream)


def test_other_comments_are_dropped(translator):
    assert translator.feed(b': {"prompt_tokens":3}\n\n: prefill x/y\n\n') == b""


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_is_no_json_is_the_neurons_fault(translator, stream):
    with pytest.raises(UpstreamError):
        translator.feed(b"data: {oops\n\n") if stream else translator.whole(b"<html>")


def test_the_count_is_that_of_the_tokenizer():
    body = msgspec.json.encode({"count": 7, "max_model_len": 10, "tokens": [1] * 7})
    assert json.loads(CountTranslator().whole(body)) == {"input_tokens": 7}
