"""A model's text taken apart: that nothing is touched which is no call and no reasoning, whatever comes."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helexa.engine.output import Content, OutputFormat, OutputParser, Reasoning, ThinkMarkers, ToolArguments
from helexa.engine.output.events import ToolStart
from support.model_output import (
    JSON_OSLO,
    OSLO,
    THINK,
    TOOLS,
    XML_OSLO,
    found_in,
    loaded,
    make_parser,
    read,
    summary,
    wrapped,
)

# Text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\n ",
        "Hello.\n",
        "  indented\r\n\ttext  ",
        "a < b and c > d, a<b",
        "<tool",
        "<tool_call",
        "<tool_call>",
        "</tool_call>",
        "the tag `<tool_call>` begins a call",
        "<tool_call> is a tag\n</tool_call>",
        "<tool_call>\n</tool_call>",
        "<tool_call>I will look it up.</tool_call>",
        "<function=unknown>\n<parameter=a>\n1\n</parameter>\n</function>",
        "write <function=get_weather> in the middle of a line",
        "<functional> <function> <function=",
        "say <think>this</think> in the middle",
        "the end </think> of a line",
        "It looks like this:\n```\n<think>\nHm.\n</think>\n```\n",
        "<thin",
        "</thin",
        '{"name": "get_weather"',
        '{"name": "somebody", "arguments": {"city": "Oslo"}}',
        '{"title": "a document"}',
        "{\n  'a': 1\n}\n{}",
        f"For example:\n{JSON_OSLO}",
        f"For example:\n```json\n{JSON_OSLO}\n```\n",
        "```json\n[1, 2]\n```",
        "``` \n```",
        "x = {\n",
        "<tool_call>[]</tool_call>",
        '<tool_call>["get_weather"]</tool_call>',
        '<tool_call>{"city": 5, "planet": 6}</tool_call>',
        '<tool_call>{"name": ""}</tool_call>',
        "<tool_call><function=></tool_call>",
    ],
)
def test_text_without_calls_comes_out_as_it_is(text):
    assert found_in(text) == ([("content", text)] if text else [])


@given(st.text())
def test_without_tools_and_reasoning_any_text_comes_out_as_it_is(text):
    found = read(OutputParser(), [text])
    assert found == ([("content", text)] if text else [])


def test_calls_are_text_where_no_tools_are_given():
    text = f"<think>hm</think>{wrapped(JSON_OSLO)}"
    assert found_in(text, tools=()) == [("reasoning", "hm"), ("content", wrapped(JSON_OSLO))]
    quiet = OutputFormat(THINK, "hermes").parser(tools=TOOLS, parse_tools=False)
    assert read(quiet, wrapped(JSON_OSLO)) == [("content", wrapped(JSON_OSLO))]


def test_text_is_held_back_only_while_it_may_be_a_tag():
    parser = make_parser()
    assert parser.push("Hello") == [Content("Hello")]
    assert parser.push(" ") == []
    assert parser.push("you <") == [Content(" you")]
    assert parser.push("tool") == []
    assert parser.push("s>") == [Content(" <tools>")]
    assert parser.flush() == []


# Reasoning


@pytest.mark.parametrize(
    ("text", "thinking", "found"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", False, [("reasoning", "Hm."), ("content", "Yes.")]),
        ("Hm.\n</think>\n\nYes.\n", True, [("reasoning", "Hm."), ("content", "Yes.\n")]),
        ("<think>\nHm.</think>Yes.", True, [("reasoning", "Hm."), ("content", "Yes.")]),
        ("\n</think>\n\nYes.", True, [("content", "Yes.")]),
        ("Hm. So\n\n", True, [("reasoning", "Hm. So\n\n")]),
        ("Hm </thin", True, [("reasoning", "Hm </thin")]),
        ("a\n\n  b <c> d\n</think>\n\n", True, [("reasoning", "a\n\n  b <c> d")]),
        (
            "a\n</think>\n<think>\nb\n</think>\nc",
            True,
            [("reasoning", "a\nb"), ("content", "c")],
        ),
        ("Yes.\n</think>\n\nNo.", False, [("content", "Yes.\nNo.")]),
        ("</think>\n\nYes.", False, [("content", "Yes.")]),
    ],
)
def test_reasoning_is_told_from_the_answer(text, thinking, found):
    assert found_in(text, thinking=thinking) == found


def test_the_parser_says_whether_the_model_is_thinking():
    parser = make_parser(prompt_tail="<think>\n")
    assert parser.is_in_reasoning
    parser.push("Hm.")
    assert parser.is_in_reasoning
    parser.push("</think>")
    assert not parser.is_in_reasoning


def test_reasoning_streams_without_waiting_for_its_end():
    parser = make_parser(prompt_tail="<think>\n")
    assert parser.push("Let me see") == [Reasoning("Let me see")]
    assert parser.push(".\n") == [Reasoning(".")]
    assert parser.push("</think>\n\nSo") == [Content("So")]


# Calls


@pytest.mark.parametrize("body", [JSON_OSLO, XML_OSLO])
@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ("", "", [OSLO]),
        ("\n", "\n", [OSLO]),
        ("I will look.", "\n", [("content", "I will look."), OSLO]),
        ("I will look.\n\n", "", [("content", "I will look."), OSLO]),
        ("", "\n\nDone.\n", [OSLO, ("content", "Done.\n")]),
        ("I will.", "Done.", [("content", "I will."), OSLO, ("content", "\nDone.")]),
        ("I will.\n\n", "\nDone.", [("content", "I will."), OSLO, ("content", "\n\nDone.")]),
        ("<think>\nHm.\n</think>\n\n", "", [("reasoning", "Hm."), OSLO]),
    ],
)
def test_only_whitespace_between_a_call_and_text_is_dropped(body, before, after, found):
    assert found_in(before + wrapped(body) + after) == found


def test_several_calls_are_numbered():
    now = ("call", "now", {})
    text = f"{wrapped(JSON_OSLO)}\n{wrapped(XML_OSLO)}\n" + wrapped('{"name": "now", "arguments": {}}')
    assert found_in(text) == [OSLO, OSLO, now]
    assert found_in(wrapped("<function=now>\n</function>") * 2) == [now, now]


def test_arguments_of_json_stream_while_they_come():
    parser = make_parser()
    assert parser.push('<tool_call>\n{"name": "write_file", "argum') == []
    assert parser.push('ents": {"path": "a.t') == [
        ToolStart(0, "write_file"),
        ToolArguments(0, '{"path": "a.t'),
    ]
    assert parser.push('xt", "content": "x\\') == [ToolArguments(0, 'xt", "content": "x')]
    assert parser.push("ny") == [ToolArguments(0, "\\ny")]
    assert parser.push('"}}') == [ToolArguments(0, '"}')]
    assert parser.push("\n</tool_call>") == []
    assert parser.flush() == []


def test_arguments_of_xml_stream_while_they_come():
    parser = make_parser()
    assert parser.push("<tool_call>\n<function=write_file>") == [
        ToolStart(0, "write_file"),
    ]
    assert parser.push("\n<parameter=path>\na.t") == [ToolArguments(0, '{"path": "a.t')]
    assert parser.push('xt\n</parameter>\n<parameter=content>\nsay "') == [
        ToolArguments(0, 'xt", "content": "say \\"')
    ]
    assert parser.push('hi"\n') == [ToolArguments(0, 'hi\\"')]
    assert parser.push("more\n</par") == [ToolArguments(0, "\\nmore")]
    assert parser.push("ameter>\n</function>\n</tool_call>") == [ToolArguments(0, '"}')]


# Calls in reasoning


@pytest.mark.parametrize("end", ["", "\n</think>", "\n</think>\n\n"])
@pytest.mark.parametrize("calls", [[JSON_OSLO], [XML_OSLO], [JSON_OSLO, XML_OSLO]])
def test_calls_that_end_the_reasoning_are_calls(calls, end):
    text = "I will look.\n\n" + "\n".join(map(wrapped, calls)) + end
    assert found_in(text, thinking=True) == [("reasoning", "I will look."), *([OSLO] * len(calls))]


def test_a_function_without_tool_call_may_end_the_reasoning():
    assert found_in(f"Hm.\n{XML_OSLO}", thinking=True) == [("reasoning", "Hm."), OSLO]


@pytest.mark.parametrize("after", ["\nOr not.\n</think>\n\nNo.", "\n</think>\n\nNo."])
def test_calls_that_are_only_thought_of_stay_reasoning(after):
    thought = f"I could call\n{wrapped(JSON_OSLO)}"
    found = found_in(thought + after, thinking=True)
    reasoning = (thought + after).partition("\n</think>")[0]
    assert found == [("reasoning", reasoning), ("content", "No.")]


@pytest.mark.parametrize(
    "example",
    [
        "<tool_call>\n" + JSON_OSLO[:-3],
        "<tool_call>\n{...",
        "<tool_call>\n<function=get_weather>\n<parameter=city>",
    ],
)
def test_a_broken_call_in_the_reasoning_does_not_swallow_the_answer(example):
    text = f"They look like\n{example}\nand so on.\n</think>\n\nYes.\n{wrapped(JSON_OSLO)}"
    found = found_in(text, thinking=True)
    assert found == [("reasoning", text.partition("\n</think>")[0]), ("content", "Yes."), OSLO]


def test_a_call_that_is_thought_of_and_then_made_is_made_once():
    text = f"I could call\n{wrapped(JSON_OSLO)}\n</think>\n\n{wrapped(XML_OSLO)}"
    assert found_in(text, thinking=True) == [("reasoning", f"I could call\n{wrapped(JSON_OSLO)}"), OSLO]


def test_broken_calls_without_end_are_read_in_linear_time():
    text = '<tool_call>{"' * 20_000
    assert found_in(text) == [("content", text)]


# Whatever comes


_PIECES = st.sampled_from(
    [
        "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=get_weather>", "<function=fly>",
        "</function>", "<parameter=city>", "<parameter=days>", "</parameter>", "\n", "\n\n", " ", "\r\n", "<",
        ">", "{", "}", "[", "]", '"', "'", ",", ":", "\\", "```json\n", "```", "Oslo", "3", "True", "null",
        '{"name": "get_weather", "arguments": {', '{"name": "', '"arguments"', "get_weather", "\\u00e9",
        "\\ud83d", "é😀", JSON_OSLO, XML_OSLO,
    ]
)  # fmt: skip
_TEXTS = st.lists(_PIECES | st.text(max_size=5), max_size=30).map("".join)


@st.composite
def _cut(draw):
    text = draw(_TEXTS)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@settings(max_examples=400)
@given(pieces=_cut(), thinking=st.booleans(), truncated=st.booleans())
def test_how_a_text_is_cut_makes_no_difference(pieces, thinking, truncated):
    tail = "<think>\n" if thinking else ""
    found = read(make_parser(prompt_tail=tail), pieces, truncated=truncated)
    assert found == read(make_parser(prompt_tail=tail), ["".join(pieces)], truncated=truncated)
    assert found == read(make_parser(prompt_tail=tail), "".join(pieces), truncated=truncated)


@settings(max_examples=400)
@given(text=_TEXTS, thinking=st.booleans())
def test_whatever_is_read_arguments_are_objects(text, thinking):
    found = read(make_parser(prompt_tail="<think>" if thinking else ""), [text])
    for item in loaded(found):
        assert item[0] != "call" or isinstance(item[2], dict)


@settings(max_examples=400)
@given(text=_TEXTS)
def test_no_text_is_lost_where_nothing_is_a_call(text):
    found = read(make_parser(), [text])
    if not any(item[0] == "call" for item in found):
        kept = "".join(item[1] for item in found)
        for tag in ("<think>", "</think>"):
            text, kept = text.replace(tag, ""), kept.replace(tag, "")
        assert "".join(kept.split()) == "".join(text.split())


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(
    arguments=st.dictionaries(st.text(), _VALUES, max_size=5),
    indent=st.sampled_from([None, 2]),
    ascii_only=st.booleans(),
)
@example(arguments={"a": '</tool_call>", "b": {'}, indent=None, ascii_only=False)
def test_valid_json_means_what_it_says(arguments, indent, ascii_only):
    call = {"name": "free", "arguments": arguments}
    text = wrapped(json.dumps(call, indent=indent, ensure_ascii=ascii_only))
    found = read(make_parser(), [text])
    assert loaded(found) == [("call", "free", arguments)]
    if indent is None and not ascii_only:
        assert found[0][2] == json.dumps(arguments, ensure_ascii=False)


@given(path=st.text(), content=st.text(), days=st.integers())
def test_xml_means_what_it_says(path, content, days):
    text = wrapped(
        f"<function=write_file>\n<parameter=path>\n{path}\n</parameter>\n"
        f"<parameter=content>\n{content}\n</parameter>\n</function>"
    )
    assert found_in(text) == [("call", "write_file", {"path": path, "content": content})]
    text = wrapped(f"<function=get_weather>\n<parameter=days>\n{days}\n</parameter>\n</function>")
    assert found_in(text) == [("call", "get_weather", {"days": days})]


def test_other_markers_of_reasoning_are_read_too():
    parser = OutputParser(ThinkMarkers("[THINK]", "[/THINK]"))
    assert read(parser, "[THINK]a [b] [/x][/THINK]c [d]") == [
        ("reasoning", "a [b] [/x]"),
        ("content", "c [d]"),
    ]


def test_the_number_of_calls_is_known():
    parser = make_parser()
    events = parser.push(wrapped(JSON_OSLO) * 2)
    assert summary(events + parser.flush())
    assert parser.num_calls == 2
