"""Grammars: what is allowed after each piece of text, when a text may end, and how bad ones are refused."""

import json
import threading

import llguidance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa.engine import grammar as grammar_module
from helexa.engine.grammar import GrammarCompiler, GrammarSpec
from helexa.errors import InvalidParameter

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def _schema(schema):
    return GrammarSpec("json_schema", json.dumps(schema))


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer)


def _walk(matcher, token_ids):
    """Takes the tokens, each of which must be allowed."""
    for token_id in token_ids:
        assert matcher.allowed()[token_id]
        matcher.consume(token_id)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (GrammarSpec("json_object"), '{"a": [1, 2.5e3, null, {"b": "\\n é"}]}'),
        (_schema(SCHEMA), '{"name": "Ada", "age": 36}'),
        (_schema(SCHEMA), '{\n  "name": "日本",\n  "age": -1,\n  "ok": true\n}'),
        (_schema({"enum": ["red", "green"]}), '"green"'),
        (GrammarSpec("regex", r"[0-9]{3}-[a-f]+"), "123-abc"),
        (GrammarSpec("lark", 'start: "<call>" %json {"type": "object"} "</call>"'), '<call>{"x": 1}</call>'),
    ],
)
def test_a_text_of_the_grammar_is_allowed_token_by_token_and_may_end_only_when_it_is_whole(
    compiler, tokenizer, spec, text
):
    matcher = compiler.compile(spec)
    token_ids = tokenizer.encode(text)
    whole = {len(token_ids)}
    if spec.kind == "regex":
        whole |= {len(token_ids) - 2, len(token_ids) - 1}  # 123-a, 123-ab
    for position, token_id in enumerate(token_ids):
        allowed = matcher.allowed()
        assert allowed[token_id]
        assert allowed[tokenizer.eos_token_id] == (position in whole)
        matcher.consume(token_id)
    if not matcher.is_complete:
        assert matcher.allowed()[tokenizer.eos_token_id]
        matcher.consume(tokenizer.eos_token_id)
    assert matcher.is_complete


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        '{"name": 1',
        '{"age": 1}',
        '{"name": "x", "age": 1.5',
        '{"name": "x", "age": 1, "more"',
        "{name",
    ],
)
def test_a_text_outside_the_grammar_is_cut_off_where_it_leaves_it(compiler, tokenizer, text):
    matcher = compiler.compile(_schema(SCHEMA))
    for token_id in tokenizer.encode(text):
        if not matcher.allowed()[token_id]:
            return
        matcher.consume(token_id)
    pytest.fail(f"{text!r} was let through")


def test_control_tokens_are_never_text_but_what_they_spell_may_be(compiler, tokenizer):
    matcher = compiler.compile(GrammarSpec("regex", r".*"))
    assert not matcher.allowed()[tokenizer.special_tokens["<|im_start|>"]]
    _walk(matcher, tokenizer.encode("<|im_start|>", parse_special=False))


def test_characters_may_come_in_pieces(compiler, tokenizer):
    matcher = compiler.compile(GrammarSpec("regex", "[à-ü]"))
    first, second = "é".encode()
    assert matcher.allowed()[tokenizer.encode("é")[0]]
    ids = tokenizer.encode("é")
    assert [tokenizer.token_bytes(i)[0] for i in ids] == [first, second]
    _walk(matcher, ids)
    assert matcher.is_complete


@pytest.mark.parametrize(("start", "most"), [("{", 1), ("{\n", 64), ('{"a":', 1)])
def test_blanks_in_json_are_bounded(compiler, tokenizer, start, most):
    matcher = compiler.compile(GrammarSpec("json_object"))
    _walk(matcher, tokenizer.encode(start))
    (blank,) = tokenizer.encode(" ")
    for _ in range(most):
        assert matcher.allowed()[blank]
        matcher.consume(blank)
    assert not matcher.allowed()[blank]


def test_text_that_a_tokenizer_would_normalise_is_spelled_as_the_grammar_wants_it(make_tokenizer):
    tokenizer = make_tokenizer(pre="qwen2", merges=())
    decomposed = "e\u0301t"
    assert tokenizer.decode(tokenizer.encode(decomposed)) != decomposed
    matcher = GrammarCompiler(tokenizer).compile(_schema({"const": decomposed}))
    written = []
    while not matcher.is_complete:
        written.append(int(matcher.allowed().argmax()))
        matcher.consume(written[-1])
    assert json.loads(tokenizer.decode(written)) == decomposed


def test_a_vocabulary_without_an_end_still_has_texts_that_end(make_tokenizer):
    tokenizer = make_tokenizer(end="")
    assert not tokenizer.eos_token_ids
    matcher = GrammarCompiler(tokenizer).compile(_schema({"const": 1}))
    assert len(matcher.allowed()) == tokenizer.vocab_size
    _walk(matcher, tokenizer.encode("1"))
    assert matcher.is_complete


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (GrammarSpec("json_schema", "{type: object}"), "is not JSON"),
        (_schema({"type": "objekt"}), "objekt"),
        (_schema({"not": {"type": "string"}}), "Unimplemented keys"),
        (_schema({"$ref": "#/$defs/missing"}), "missing"),
        (GrammarSpec("json_schema", "true"), "is true; expected an object"),
        (GrammarSpec("json_schema", "[" * 100_000), "is not JSON"),
        (GrammarSpec("regex", "a" * 300_000), "has 300000 characters"),
        (GrammarSpec("regex", "a\ud800"), "not valid Unicode"),
        (GrammarSpec("regex", "(" * 50_000 + "a" + ")" * 50_000), "invalid regex"),
        (GrammarSpec("regex", "(a"), "unclosed group"),
        (GrammarSpec("lark", "start: other"), "other"),
    ],
)
def test_a_bad_grammar_is_refused_with_the_reason(compiler, spec, words):
    with pytest.raises(InvalidParameter, match=words) as caught:
        compiler.compile(spec)
    assert caught.value.param == "response_format"
    assert len(caught.value.message) < 600


@pytest.mark.parametrize("kind", ["lark", "json_schema"])
def test_a_grammar_may_nest_as_deeply_as_it_is_long_and_nothing_crashes(compiler, tokenizer, kind):
    depth = 4000
    if kind == "lark":
        rules = "\n".join(f'a{i}: "[" a{i + 1} "]" | "x"' for i in range(depth))
        spec = GrammarSpec("lark", f'start: a0\n{rules}\na{depth}: "x"')
    else:
        definitions = {
            f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(depth)
        }
        spec = _schema({"$ref": "#/$defs/d0", "$defs": definitions | {f"d{depth}": {"type": "integer"}}})
    size = threading.stack_size()
    _walk(compiler.compile(spec), tokenizer.encode("[["))
    assert threading.stack_size() == size


def test_an_unknown_kind_is_refused():
    with pytest.raises(InvalidParameter, match="'gbnf'"):
        GrammarSpec("gbnf", "root ::= x")


def test_the_latest_grammars_are_kept_and_old_ones_go(tokenizer, monkeypatch):
    monkeypatch.setattr(grammar_module, "_CACHED", 2)
    compiler = GrammarCompiler(tokenizer)
    a, b, c = (GrammarSpec("regex", letter) for letter in "abc")
    for spec in (a, b, a, c):
        compiler.compile(spec)
    assert [compiler.is_compiled(spec) for spec in (a, b, c)] == [True, False, True]


def test_a_grammar_is_compiled_anew_once_its_copies_have_seen_many_tokens(tokenizer, monkeypatch):
    """Copies share what the lexer has learned; without a new start it gives up one day, for everybody."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 40)) for _ in range(60)]
    spec = GrammarSpec("regex", "|".join(words))

    def write_all():
        compiler = GrammarCompiler(tokenizer)
        for word in words:
            _walk(compiler.compile(spec), tokenizer.encode(word))

    monkeypatch.setattr(grammar_module, "_LIMITS", llguidance.LLParserLimits(max_lexer_states=1000))
    with pytest.raises(InvalidParameter, match="too many states"):
        write_all()
    monkeypatch.setattr(grammar_module, "_WORN_TOKENS", 200)
    write_all()


def test_a_grammar_that_fails_at_its_first_step_is_refused_when_it_is_compiled(tokenizer, monkeypatch):
    monkeypatch.setattr(grammar_module, "_LIMITS", llguidance.LLParserLimits(max_lexer_states=10))
    compiler, spec = GrammarCompiler(tokenizer), GrammarSpec("regex", "[a-z]+x|[0-9]+y|abc")
    with pytest.raises(InvalidParameter, match=r"failed after 0 tokens.*too many states"):
        compiler.compile(spec)
    assert not compiler.is_compiled(spec)


def test_matchers_of_one_grammar_know_nothing_of_each_other(compiler, tokenizer):
    spec = GrammarSpec("regex", "ab*c")
    first, second = compiler.compile(spec), compiler.compile(spec)
    _walk(first, tokenizer.encode("ab"))
    assert second.allowed().sum() == 1
    _walk(second, tokenizer.encode("ac"))
    _walk(first, tokenizer.encode("c"))


def test_compiling_from_many_threads_at_once_works(tokenizer):
    compiler = GrammarCompiler(tokenizer)
    failures = []

    def work(number):
        try:
            for i in range(10):
                matcher = compiler.compile(GrammarSpec("regex", f"[a-z]+{(number + i) % 5}"))
                _walk(matcher, tokenizer.encode(f"abc{(number + i) % 5}"))
                assert matcher.is_complete
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_grammar_that_gets_too_complex_ends_with_a_sentence(compiler, tokenizer):
    matcher = compiler.compile(GrammarSpec("regex", "a+"))
    with pytest.raises(InvalidParameter, match="the grammar failed after 1 tokens"):
        matcher.consume(tokenizer.encode("b")[0])
    with pytest.raises(InvalidParameter, match="the grammar failed"):
        matcher.allowed()


def test_the_field_that_asks_is_named_although_a_compiled_grammar_is_shared(compiler, tokenizer):
    mine, other = GrammarSpec("regex", "ba+", param="tools"), GrammarSpec("regex", "ba+")
    for spec, param in ((mine, "tools"), (other, "response_format")):
        matcher = compiler.compile(spec)
        assert compiler.is_compiled(other), "it was compiled for either"
        with pytest.raises(InvalidParameter) as caught:
            matcher.consume(tokenizer.encode("c")[0])
        assert caught.value.param == param
    with pytest.raises(InvalidParameter) as caught:
        compiler.compile(GrammarSpec("regex", "(a", param="tools"))
    assert caught.value.param == "tools"


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32))
def test_whatever_a_blind_writer_picks_from_what_is_allowed_is_valid(compiler, tokenizer, seed):
    rng = np.random.default_rng(seed)
    matcher = compiler.compile(
        _schema(SCHEMA | {"properties": SCHEMA["properties"] | {"name": {"type": "string", "maxLength": 6}}})
    )
    written = []
    while not matcher.is_complete:
        choices = np.flatnonzero(matcher.allowed())
        written.append(int(rng.choice(choices)))
        matcher.consume(written[-1])
    value = json.loads(tokenizer.decode(written, skip_special=True))
    assert set(value) - {"ok"} == {"name", "age"}
    assert isinstance(value["age"], int)
    assert len(value["name"]) <= 6
