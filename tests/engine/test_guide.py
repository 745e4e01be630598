"""Thinking blocks and grammars as a state machine over tokens, without logits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa.engine.grammar import GrammarCompiler, GrammarSpec
from helexa.engine.guide import Guide, Thinking
from helexa.errors import InvalidParameter

DIGITS = GrammarSpec("regex", "[0-9]{2}")


class Writer:
    """Writes a text through a guide as a model would that insists on it, and keeps what stands there."""

    def __init__(self, tokenizer, thinking=None, grammar=None):
        matcher = GrammarCompiler(tokenizer).compile(grammar) if grammar else None
        self.tokenizer = tokenizer
        self.guide = Guide(tokenizer, thinking, matcher)
        self.written = []
        self.thought = []

    def write(self, text):
        """Refuses tokens that may not come, and gives way to those that must."""
        for token_id in self.tokenizer.encode(text):
            self.yield_to_forced()
            choice = self.guide.next()
            assert choice is None or choice[token_id], f"{self.text!r} may not go on with {text!r}"
            self._accept(token_id)
        return self

    def yield_to_forced(self):
        while isinstance(choice := self.guide.next(), int):
            self._accept(choice)
        return self

    def _accept(self, token_id):
        assert not self.guide.is_complete
        self.written.append(self.guide.accept(token_id))
        if self.guide.is_thinking:
            self.thought.append(self.written[-1])

    @property
    def text(self):
        return self.tokenizer.decode(self.written)

    @property
    def thoughts(self):
        return self.tokenizer.decode(self.thought)

    def may(self, text):
        choice = self.guide.next()
        (token_id,) = self.tokenizer.encode(text)
        return choice is None or (choice == token_id if isinstance(choice, int) else bool(choice[token_id]))


@pytest.fixture
def writer(tokenizer):
    return lambda thinking=None, grammar=None: Writer(tokenizer, thinking, grammar)


@pytest.fixture
def plain(make_tokenizer):
    """A tokenizer that spells the markers out, byte by byte, and merges their last one with what follows."""
    return make_tokenizer("qwen2", markers=False, merges=("> \\n", ">\\n \\n", '> "'))


# Without a grammar


def test_without_a_budget_and_a_grammar_nothing_is_forced(writer):
    text = "hm\n</think>\n\nYes</think>"
    made = writer(Thinking(open=True)).write(text)
    assert made.text == text
    assert made.thoughts == "hm\n</think>\n\n"


def test_a_spent_budget_ends_the_block_and_the_answer_begins(writer):
    made = writer(Thinking(open=True, budget=5)).write("thinking on and on")
    assert made.text == "think\n</think>\n\ning on and on"
    assert made.thoughts == "think\n</think>\n\n"


def test_a_block_that_ends_in_time_is_left_alone(writer):
    made = writer(Thinking(open=True, budget=5)).write("ok</think>A long answer")
    assert made.text == "ok</think>A long answer"


def test_the_last_token_within_the_budget_may_end_the_block(writer):
    assert writer(Thinking(open=True, budget=3)).write("ab</think>x").text == "ab</think>x"


def test_a_budget_of_nothing_closes_an_open_block_at_once(writer):
    assert writer(Thinking(open=True, budget=0)).write("Yes").text == "\n</think>\n\nYes"


@pytest.mark.parametrize("blanks", ["", "\n", " \n "])
def test_a_block_that_the_model_opens_itself_is_bounded_too(writer, blanks):
    made = writer(Thinking(open=False, budget=2)).write(f"{blanks}<think>abcd")
    assert made.text == f"{blanks}<think>ab\n</think>\n\ncd"


def test_what_only_begins_like_a_block_belongs_to_the_answer(plain):
    made = Writer(plain, Thinking(open=True)).write("hm</think>\n\n<this>")
    assert made.thoughts == "hm</think>\n\n"


def test_a_second_block_is_on_the_same_budget(writer):
    made = writer(Thinking(open=True, budget=5)).write("ab</think>\n<think>cdefgh")
    assert made.text == "ab</think>\n<think>cde\n</think>\n\nfgh"
    assert made.thoughts == "ab</think>\n<think>cde\n</think>\n\n"


def test_a_block_that_has_spent_the_budget_is_not_opened_again(writer):
    made = writer(Thinking(open=True, budget=2)).write("ab").yield_to_forced()
    assert not made.may("<think>")
    assert made.may("\n")
    assert made.write("c").may("<think>")
    assert writer(Thinking(open=False, budget=0)).may("<think>")


def test_a_marker_of_many_tokens_that_opens_a_spent_block_again_is_closed_at_once(plain):
    made = Writer(plain, Thinking(open=True, budget=2)).write("ab<think>Yes")
    assert made.text == "ab\n</think>\n\n<think>\n</think>\n\nYes"


def test_an_answer_without_a_block_is_left_alone_even_if_it_speaks_of_one_later(writer):
    text = "No <think>abcd</think> here"
    made = writer(Thinking(open=False, budget=2)).write(text)
    assert made.text == text
    assert made.thoughts == ""


@pytest.mark.parametrize("budget", [1, 4, 100])
def test_markers_may_be_spelled_in_many_tokens(plain, budget):
    made = Writer(plain, Thinking(open=False, budget=budget)).write("<think>abc</think>\n\nYes")
    expected = {1: "<think>a\n</think>\n\nbc</think>\n\nYes", 4: "<think>abc<\n</think>\n\n/think>\n\nYes"}
    assert made.text == expected.get(budget, "<think>abc</think>\n\nYes")


def test_an_end_of_sequence_within_the_block_is_the_models_own_affair(writer, tokenizer):
    made = writer(Thinking(open=True)).write("hm<|im_end|>")
    assert made.written[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "wrong", [{"start": ""}, {"end": ""}, {"closing": "\n\n"}, {"end": "[/T]"}, {"budget": -1}]
)
def test_a_description_that_cannot_work_is_refused(wrong):
    with pytest.raises(InvalidParameter):
        Thinking(open=True, **wrong)


# With a grammar


def test_the_grammar_begins_behind_the_block(writer, tokenizer):
    made = writer(Thinking(open=True), DIGITS).write("x = 7, no: 12</think>").yield_to_forced()
    assert made.text == "x = 7, no: 12</think>\n\n"
    assert not made.may("a")
    assert not made.may("<|im_end|>")
    made.write("42")
    assert made.guide.is_complete
    assert made.text == "x = 7, no: 12</think>\n\n42"
    assert made.thoughts == "x = 7, no: 12</think>\n\n"


def test_the_grammar_begins_behind_a_block_whose_budget_is_spent(writer):
    made = writer(Thinking(open=True, budget=2), DIGITS).write("ab").yield_to_forced()
    assert made.text == "ab\n</think>\n\n"
    assert not made.may("a")
    assert made.write("42").guide.is_complete


def test_an_end_of_sequence_within_the_block_ends_the_block_where_a_grammar_waits(writer, tokenizer):
    made = writer(Thinking(open=True), DIGITS).write("hm<|im_end|>42")
    assert made.text == "hm\n</think>\n\n42"
    assert tokenizer.eos_token_id not in made.written


def test_where_the_block_is_not_open_the_first_token_opens_it_or_belongs_to_the_grammar(writer):
    thinking = Thinking(open=False)
    assert writer(thinking, DIGITS).write("42").text == "42"
    assert writer(thinking, DIGITS).write("<think>hm</think>42").text == "<think>hm</think>\n\n42"
    made = writer(thinking, DIGITS)
    assert not made.may("a")
    assert not made.write("4").may("<think>")


def test_a_budget_of_nothing_keeps_the_block_from_being_opened_where_a_grammar_waits(writer):
    assert not writer(Thinking(open=False, budget=0), DIGITS).may("<think>")


def test_a_grammar_that_could_say_the_marker_itself_still_lets_the_model_think(writer):
    made = writer(Thinking(open=False), GrammarSpec("regex", "(<think>)?[0-9]")).write("<think>a</think>7")
    assert made.text == "<think>a</think>\n\n7"


@pytest.mark.parametrize("last", [">\n\n", '>"'])
def test_a_token_that_goes_on_behind_the_marker_leaves_the_grammar_its_beginning(plain, last):
    made = Writer(plain, Thinking(open=True), DIGITS).write("a</think")
    (token_id,) = plain.encode(last)
    made._accept(token_id)
    made.yield_to_forced()
    assert made.text == "a</think>\n\n"
    assert made.write("42").guide.is_complete


def test_a_marker_of_many_tokens_is_completed_once_begun(plain):
    made = Writer(plain, Thinking(open=False), DIGITS).write("<").yield_to_forced()
    assert made.text == "<think>"


def test_a_first_token_that_the_grammar_wants_is_no_marker_that_was_begun(plain):
    made = Writer(plain, Thinking(open=False), GrammarSpec("regex", "<[a-z]+>")).write("<b")
    assert made.text == "<b"


def test_a_single_choice_is_forced_without_looking_at_logits(writer, tokenizer):
    made = writer(grammar=GrammarSpec("regex", "(abc|abd)e"))
    assert made.guide.next() == tokenizer.encode("a")[0]
    made.write("")
    made.yield_to_forced()
    assert made.text == "ab"


def test_without_thinking_the_grammar_holds_from_the_first_token(writer):
    made = writer(grammar=DIGITS)
    assert not made.may("<think>")
    assert made.write("42").guide.is_complete


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    is_open=st.booleans(),
    budget=st.one_of(st.none(), st.integers(0, 8)),
    has_markers=st.booleans(),
)
def test_whatever_is_picked_the_answer_behind_the_block_follows_the_grammar(
    make_tokenizer, seed, is_open, budget, has_markers
):
    tokenizer = make_tokenizer(markers=has_markers)
    made = Writer(tokenizer, Thinking(open=is_open, budget=budget), DIGITS)
    rng = np.random.default_rng(seed)
    likely = tokenizer.encode("<think>7</think>\n<|im_end|>")
    while not made.guide.is_complete and len(made.written) < 200:
        choice = made.guide.next()
        if isinstance(choice, int):
            made._accept(choice)
        elif choice is None:
            made._accept(int(rng.choice(likely)))
        else:
            made._accept(int(rng.choice(np.flatnonzero(choice))))
    if made.guide.is_complete or budget is not None:
        assert made.guide.is_complete
        text = made.text
        thought = is_open or text.startswith("<think>")
        answer = text.partition("</think>\n\n")[2] if thought else text
        assert len(answer) == 2
        assert answer.isdigit()
    if budget is not None:
        marked = len(tokenizer.encode("<think>")) + len(tokenizer.encode("\n</think>\n\n"))
        assert len(made.thought) <= budget + marked + len(tokenizer.encode("</think>\n\n"))
