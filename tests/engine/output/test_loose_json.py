"""JSON as models write it: valid JSON stays what it is, anything else becomes valid."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa.engine.output.loose_json import LooseJson, read_whole
from helexa.engine.output.source import Source, finished

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


def _written(text, *, truncated=False):
    source, parts = Source(text, ended=True), []
    source.truncated = truncated
    finished(LooseJson(source).value(parts.append))
    return "".join(parts)


@given(value=_VALUES, indent=st.sampled_from([None, 1]), compact=st.booleans(), ascii_only=st.booleans())
def test_valid_json_keeps_its_meaning(value, indent, compact, ascii_only):
    separators = (",", ":") if compact else None
    text = json.dumps(value, indent=indent, separators=separators, ensure_ascii=ascii_only)
    assert json.loads(read_whole(text)) == value


@given(value=_VALUES)
def test_json_as_python_writes_it_stays_as_it_is(value):
    text = json.dumps(value, ensure_ascii=False)
    assert read_whole(text) == text


@settings(max_examples=300)
@given(st.lists(st.sampled_from([*"{}[]\"',:\\ \nntu0d8_1.-e<`", "True", "\\u", "\\ud83d"]), max_size=40))
def test_whatever_is_read_valid_json_is_written(pieces):
    json.loads(_written("".join(pieces)))


@given(value=_VALUES, data=st.data())
def test_what_is_cut_off_is_the_beginning_of_the_whole(value, data):
    text = json.dumps(value, ensure_ascii=False)
    length = data.draw(st.integers(0, len(text)))
    assert text.startswith(_written(text[:length], truncated=True))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{'a': 'it\"s'}", {"a": 'it"s'}),
        ("{a: 1, b-c: two words}", {"a": 1, "b-c": "two words"}),
        ('{"a": 1,, "b": 2,}', {"a": 1, "b": 2}),
        ('{"a": "x"\n"b": "y"}', {"a": "x", "b": "y"}),
        ("[1, 2,]", [1, 2]),
        ("[1, [2, 3", [1, [2, 3]]),
        ('{"a": [1, 2}', {"a": [1, 2]}),
        ('[{"a": 1]', [{"a": 1}]),
        ('{"a": {"b": 1}', {"a": {"b": 1}}),
        ('{"a"', {"a": None}),
        ("[True, False, None, NaN]", [True, False, None, None]),
        ("[+1, .5, 1., 007, 1_000, -0, inf]", [1, 0.5, 1, "007", "1_000", 0, "inf"]),
        (r'"\d \x \' \/ \u00e9 \u12"', "\\d \\x ' / é \\u12"),
        (r'"\ud83d\ude00 \ud83d \ude00"', "😀 \ufffd \ufffd"),
        ('"a\nb\tc\x01"', "a\nb\tc\x01"),
        ('{"a": "say "hi", now", "b": "c"}', {"a": 'say "hi", now', "b": "c"}),
        ('["a "b" c", "d"]', ['a "b" c', "d"]),
        ('"open', "open"),
        ('"open\\', "open\\"),
        ("", None),
        ("word", "word"),
    ],
)
def test_what_models_make_of_json_is_repaired(text, value):
    assert json.loads(_written(text)) == value


@pytest.mark.parametrize("text", ["{} {}", "[1] x", '"a" b"', '{"a": 1}}'])
def test_more_than_one_value_is_none(text):
    assert read_whole(text) is None


def test_depth_has_a_bound():
    json.loads(_written("[" * 100_000))
    json.loads(_written('{"a":' * 10_000))
