import asyncio

import pytest

from helexa.engine.sampler import Sampled
from helexa.engine.sequence import Finished, Sequence
from helexa.engine.stream import Answer, LoopMailbox, Stream


class Bytes:
    """A vocabulary of the 256 bytes."""

    vocab_size = 256

    def token_bytes(self, token_id):
        return bytes([token_id])

    def is_special(self, token_id):
        return False


def tokens(text, is_thinking=False):
    return [Sampled(byte, None, [], is_thinking) for byte in text.encode()]


@pytest.fixture
def answer():
    def make(stop=(), logprobs=False, tokenizer=None, **options):
        return Answer(Sequence([1, 2], 100, **options), tokenizer or Bytes(), stop, logprobs)

    return make


def test_a_character_is_sent_when_it_is_whole(answer):
    making = answer()
    pieces = [making.feed([event]).text for event in tokens("aß€")]
    assert pieces == ["a", "", "ß", "", "", "€"]


def test_an_unfinished_character_at_the_end_becomes_a_replacement(answer):
    delta = answer().feed([*tokens("a€")[:-1], Finished("length")])
    assert (delta.text, delta.finish_reason) == ("a\ufffd", "length")


def test_tokens_after_a_stop_string_are_neither_sent_nor_counted(answer):
    delta = answer(stop=("END",)).feed(tokens("one END two"))
    assert (delta.text, delta.finish_reason, delta.stop) == ("one ", "stop", "END")
    assert delta.usage.completion_tokens == len("one END")


def test_a_stop_string_across_deltas_is_held_back(answer):
    making = answer(stop=("END",))
    assert making.feed(tokens("one E")).text == "one "
    assert making.feed(tokens("N")).text == ""
    delta = making.feed([*tokens("E"), Finished("length")])
    assert (delta.text, delta.finish_reason, delta.stop) == ("ENE", "length", None)


def test_stop_strings_are_those_of_the_answer_and_thoughts_are_counted(answer):
    making = answer(stop=("END",))
    delta = making.feed([*tokens("to the END", is_thinking=True), *tokens("so: the END of")])
    assert (delta.text, delta.finish_reason) == ("to the ENDso: the ", "stop")
    assert (delta.usage.reasoning_tokens, delta.usage.completion_tokens) == (10, 21)


def test_a_stop_string_does_not_reach_across_the_border_of_thoughts(answer):
    making = answer(stop=("END",))
    assert making.feed(tokens("E")).text == ""
    assert making.feed(tokens("ND EN", is_thinking=True)).text == "END EN"
    assert making.feed([*tokens("D"), Finished("stop")]).text == "D"


def test_a_token_beyond_the_vocabulary_has_no_text(answer):
    delta = answer().feed([*tokens("a"), Sampled(300, None, []), *tokens("b")])
    assert (delta.text, delta.token_ids) == ("ab", [97, 300, 98])


def test_a_stop_token_counts_and_has_no_text(answer):
    delta = answer(stop_token_ids=frozenset([0])).feed([*tokens("ab\0"), Finished("stop")])
    assert (delta.text, delta.token_ids, delta.usage.completion_tokens) == ("ab", [97, 98], 3)


def test_without_a_vocabulary_there_are_token_ids_only():
    delta = Answer(Sequence([1], 100), None, ("a",), False).feed([*tokens("ab"), Finished("length")])
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("", [97, 98], "length")


def test_usage_of_a_sequence_that_never_ran_is_a_queue_time(answer):
    usage = answer().usage()
    assert usage.queue_ms >= 0
    assert (usage.prefill_ms, usage.decode_ms, usage.completion_tokens) == (0, 0, 0)


async def test_one_wake_up_serves_all_batches_that_came_meanwhile(monkeypatch):
    loop = asyncio.get_running_loop()
    mailbox = LoopMailbox(loop)
    streams = [Stream(mailbox, loop) for _ in range(2)]
    wake_ups = []
    call_soon = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *job: (wake_ups.append(job), call_soon(*job)))
    events = tokens("abc")
    for event in events:
        assert mailbox.post([(stream, event) for stream in streams])
    assert len(wake_ups) == 1
    assert [await stream.take() for stream in streams] == [events, events]
    assert mailbox.post([(streams[0], events[0])])
    assert await streams[0].take() == events[:1]
    assert len(wake_ups) == 2


def test_a_closed_loop_takes_nothing():
    loop = asyncio.new_event_loop()
    mailbox = LoopMailbox(loop)
    loop.close()
    assert not mailbox.post([])
    assert not mailbox.post([])
