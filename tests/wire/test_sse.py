"""Server-sent events as the WHATWG standard has them, whatever the network does to them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.wire import sse
from helexa.wire.sse import Event, Parser

STREAM = (
    "\ufeff: a comment\n\n"
    "event: first\nid: 7\ndata: one\ndata: two\n\n"
    "data:no space\nretry: 10\nunknown: x\n\n"
    "data\n\n"
    "event: nothing\n\n"
    "data: ünïcödé 😀\n\n"
    "data: [DONE]\n\n"
    "data: unfinished"
)
EVENTS = [
    Event("one\ntwo", "first", "7"),
    Event("no space", "message", "7"),
    Event("", "message", "7"),
    Event("ünïcödé 😀", "message", "7"),
    Event("[DONE]", "message", "7"),
]


@given(cuts=st.lists(st.integers(0, 250), max_size=12), newline=st.sampled_from(["\n", "\r\n", "\r"]))
def test_any_split_and_any_line_end_give_the_same_events(cuts, newline):
    data = STREAM.replace("\n", newline).encode()
    parser, found, last = Parser(), [], 0
    for cut in [*sorted(cuts), len(data)]:
        found += parser.feed(data[last:cut])
        last = max(last, cut)
    # A final CR may be half of a CRLF, so the event it would end is not yet known to be complete.
    assert found == EVENTS


def test_byte_by_byte_works():
    parser = Parser()
    found = [event for byte in STREAM.replace("\n", "\r\n").encode() for event in parser.feed(bytes([byte]))]
    assert found == EVENTS


def test_what_is_encoded_is_parsed_again():
    data = sse.KEEP_ALIVE + sse.encode({"text": "a\nb\r\u2028"}, "delta") + sse.encode_raw(b"{}") + sse.DONE
    assert [event.data for event in Parser().feed(data)] == ['{"text":"a\\nb\\r\u2028"}', "{}", "[DONE]"]
    assert next(iter(Parser().feed(data))).name == "delta"


def test_a_comment_of_many_lines_stays_a_comment():
    assert list(Parser().feed(sse.comment("a\ndata: b") + sse.comment(""))) == []


@pytest.mark.parametrize("data", [b"data: " + b"x" * 200, b"data: x\n" * 40])
def test_an_event_without_end_is_an_error(data):
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        list(Parser(max_bytes=100).feed(data))


@given(st.binary(max_size=200))
def test_any_bytes_are_survived(data):
    list(Parser().feed(data))


def test_the_progress_of_a_prompt_is_a_comment_and_back_again():
    prefill = sse.Prefill(3, 900)
    assert prefill.encode() == b": prefill 3/900\n\n"
    assert sse.Prefill.parse(prefill.encode().rstrip()) == prefill
    assert list(Parser().feed(prefill.encode())) == []


@pytest.mark.parametrize(
    "line", [b"", b": keep-alive", b": prefill x/9", b": prefill 1/2 ", b"data: prefill 1/2"]
)
def test_other_lines_tell_no_progress(line):
    assert sse.Prefill.parse(line) is None
