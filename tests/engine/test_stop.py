"""Stop strings in streamed text."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from helexa.engine.stop import StopStrings


def _stream(pushes, stops):
    """What a client sees of the pushes, and the stop string that ended them."""
    finder, sent = StopStrings(stops), ""
    for text in pushes:
        emitted, hit = finder.push(text)
        sent += emitted
        if hit is not None:
            return sent, hit
    return sent + finder.flush(), None


def test_text_without_a_stop_string_passes_through_at_once():
    assert StopStrings([]).push("hello") == ("hello", None)
    assert StopStrings(["xyz"]).push("hello") == ("hello", None)


def test_a_stop_string_within_one_push_ends_the_text_before_it():
    assert StopStrings(["STOP"]).push("go on STOP not this") == ("go on ", "STOP")


def test_a_stop_string_across_pushes_is_held_back_and_never_sent():
    finder = StopStrings(["\n\nUser:"])
    assert finder.push("fine.\n") == ("fine.", None)
    assert finder.push("\nUs") == ("", None)
    assert finder.push("er: more") == ("", "\n\nUser:")
    assert finder.flush() == ""


def test_text_held_back_is_sent_when_it_turns_out_to_be_something_else():
    finder = StopStrings(["</s>"])
    assert finder.push("a </") == ("a ", None)
    assert finder.push("b>") == ("</b>", None)


def test_text_held_back_at_the_end_is_flushed():
    finder = StopStrings(["</s>"])
    assert finder.push("a </s") == ("a ", None)
    assert finder.flush() == "</s"


def test_a_prefix_that_overlaps_itself_is_found():
    assert _stream("aaab", ["aab"]) == ("a", "aab")


def test_the_stop_string_that_is_complete_first_wins():
    assert _stream(["say ab and abc"], ["abc", "ab"]) == ("say ", "ab")
    assert _stream(["wxyz"], ["xyz", "y"]) == ("wx", "y")
    assert _stream(["wxyz"], ["yz", "xyz"]) == ("w", "xyz")


def test_nothing_is_emitted_after_a_hit():
    finder = StopStrings(["."])
    assert finder.push("a.b") == ("a", ".")
    assert finder.push("more") == ("", ".")


_SHORT = st.text(alphabet="ab", max_size=6)


@given(
    text=st.text(alphabet="ab", max_size=40),
    stops=st.lists(_SHORT, max_size=4),
    cuts=st.sets(st.integers(1, 39)),
)
def test_what_is_sent_does_not_depend_on_how_the_text_was_cut(text, stops, cuts):
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pushes = [text[start:end] for start, end in itertools.pairwise(edges)]
    assert _stream(pushes, stops) == _stream(list(text), stops) == _stream([text], stops)


@given(text=st.text(alphabet="ab", max_size=40), stops=st.lists(_SHORT.filter(bool), min_size=1, max_size=4))
def test_what_is_sent_never_contains_a_stop_string_and_is_the_longest_such_beginning(text, stops):
    sent, hit = _stream(list(text), stops)
    assert text.startswith(sent)
    assert not any(stop in sent for stop in stops)
    assert (sent == text) if hit is None else text[len(sent) :].startswith(hit)


@given(pushes=st.lists(_SHORT), stop=_SHORT.filter(bool))
def test_no_more_is_held_back_than_could_become_a_stop_string(pushes, stop):
    finder, sent, whole = StopStrings([stop]), "", ""
    for text in pushes:
        emitted, hit = finder.push(text)
        sent, whole = sent + emitted, whole + text
        if hit is not None:
            return
        held = whole[len(sent) :]
        assert stop.startswith(held)
        assert len(held) < len(stop)
