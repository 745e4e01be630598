"""A model's text taken apart: the formats, what models make of them, and that nothing else is touched."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helexa.engine.output import Content, OutputFormat, OutputParser, Reasoning, ThinkMarkers, ToolArguments
from helexa.engine.output.events import ToolStart
from support.model_output import TOOLS, loaded, read, summary

_THINK = ThinkMarkers("<think>", "</think>")
_OSLO = ("call", "get_weather", {"city": "Oslo"})
_JSON_OSLO = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
_XML_OSLO = "<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>"


def _parser(tools=TOOLS, *, prompt_tail=""):
    return OutputFormat(_THINK, "hermes").parser(tools=tools, prompt_tail=prompt_tail)


def _read(text, *, thinking=False, tools=TOOLS, truncated=False):
    """What the parser finds in `text`, which must not depend on how it is cut."""
    tail = "<|im_start|>assistant\n<think>\n" if thinking else "<|im_start|>assistant\n"
    whole = read(_parser(tools, prompt_tail=tail), [text], truncated=truncated)
    single = read(_parser(tools, prompt_tail=tail), text, truncated=truncated)
    assert whole == single
    return loaded(whole)


def _wrapped(body):
    return f"<tool_call>\n{body}\n</tool_call>"


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
        f"For example:\n{_JSON_OSLO}",
        f"For example:\n```json\n{_JSON_OSLO}\n```\n",
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
    assert _read(text) == ([("content", text)] if text else [])


@given(st.text())
def test_without_tools_and_reasoning_any_text_comes_out_as_it_is(text):
    found = read(OutputParser(), [text])
    assert found == ([("content", text)] if text else [])


def test_calls_are_text_where_no_tools_are_given():
    text = f"<think>hm</think>{_wrapped(_JSON_OSLO)}"
    assert _read(text, tools=()) == [("reasoning", "hm"), ("content", _wrapped(_JSON_OSLO))]
    quiet = OutputFormat(_THINK, "hermes").parser(tools=TOOLS, parse_tools=False)
    assert read(quiet, _wrapped(_JSON_OSLO)) == [("content", _wrapped(_JSON_OSLO))]


def test_text_is_held_back_only_while_it_may_be_a_tag():
    parser = _parser()
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
    assert _read(text, thinking=thinking) == found


def test_the_parser_says_whether_the_model_is_thinking():
    parser = _parser(prompt_tail="<think>\n")
    assert parser.is_in_reasoning
    parser.push("Hm.")
    assert parser.is_in_reasoning
    parser.push("</think>")
    assert not parser.is_in_reasoning


def test_reasoning_streams_without_waiting_for_its_end():
    parser = _parser(prompt_tail="<think>\n")
    assert parser.push("Let me see") == [Reasoning("Let me see")]
    assert parser.push(".\n") == [Reasoning(".")]
    assert parser.push("</think>\n\nSo") == [Content("So")]


# Calls


@pytest.mark.parametrize("body", [_JSON_OSLO, _XML_OSLO])
@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ("", "", [_OSLO]),
        ("\n", "\n", [_OSLO]),
        ("I will look.", "\n", [("content", "I will look."), _OSLO]),
        ("I will look.\n\n", "", [("content", "I will look."), _OSLO]),
        ("", "\n\nDone.\n", [_OSLO, ("content", "Done.\n")]),
        ("I will.", "Done.", [("content", "I will."), _OSLO, ("content", "\nDone.")]),
        ("I will.\n\n", "\nDone.", [("content", "I will."), _OSLO, ("content", "\n\nDone.")]),
        ("<think>\nHm.\n</think>\n\n", "", [("reasoning", "Hm."), _OSLO]),
    ],
)
def test_only_whitespace_between_a_call_and_text_is_dropped(body, before, after, found):
    assert _read(before + _wrapped(body) + after) == found


def test_several_calls_are_numbered():
    now = ("call", "now", {})
    text = f"{_wrapped(_JSON_OSLO)}\n{_wrapped(_XML_OSLO)}\n" + _wrapped('{"name": "now", "arguments": {}}')
    assert _read(text) == [_OSLO, _OSLO, now]
    assert _read(_wrapped("<function=now>\n</function>") * 2) == [now, now]


def test_arguments_of_json_stream_while_they_come():
    parser = _parser()
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
    parser = _parser()
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


# What models make of it


_DRIFT = {
    "no end": ("<tool_call>\n" + _JSON_OSLO, [_OSLO]),
    "no end, and another": (f"<tool_call>\n{_JSON_OSLO}\n" * 2, [_OSLO, _OSLO]),
    "no end, and text": (f"<tool_call>\n{_JSON_OSLO}\nThere.", [_OSLO, ("content", "There.")]),
    "no end of the object": (_wrapped(_JSON_OSLO[:-1]), [_OSLO]),
    "no end of the arguments": (_wrapped(_JSON_OSLO[:-2]), [_OSLO]),
    "no end of anything": ("<tool_call>" + _JSON_OSLO[:-2], [_OSLO]),
    "a bracket too many": (_wrapped(_JSON_OSLO + "}"), [_OSLO]),
    "no beginning": (_JSON_OSLO + "\n</tool_call>", [_OSLO]),
    "no beginning behind text": (
        f"I will look.\n{_JSON_OSLO}\n</tool_call>",
        [("content", "I will look."), _OSLO],
    ),
    "neither beginning nor end": (_JSON_OSLO, [_OSLO]),
    "two beginnings": ("<tool_call>\n" + _wrapped(_JSON_OSLO), [_OSLO]),
    "a fence within": (_wrapped(f"```json\n{_JSON_OSLO}\n```"), [_OSLO]),
    "a fence instead": (f"```json\n{_JSON_OSLO}\n```", [_OSLO]),
    "two in one": (_wrapped(f"{_JSON_OSLO}\n{_JSON_OSLO}"), [_OSLO, _OSLO]),
    "two in one with a comma": (_wrapped(f"{_JSON_OSLO},\n{_JSON_OSLO}"), [_OSLO, _OSLO]),
    "a list": (_wrapped(f"[{_JSON_OSLO}, {_JSON_OSLO}]"), [_OSLO, _OSLO]),
    "spread over lines": (_wrapped(json.dumps(json.loads(_JSON_OSLO), indent=4)), [_OSLO]),
    "arguments first": (_wrapped('{"arguments": {"city": "Oslo"}, "name": "get_weather"}'), [_OSLO]),
    "parameters": (_wrapped('{"name": "get_weather", "parameters": {"city": "Oslo"}}'), [_OSLO]),
    "as in the api": (
        _wrapped('{"id": "1", "type": "function", "function": ' + _JSON_OSLO + "}"),
        [_OSLO],
    ),
    "arguments as a text": (
        _wrapped('{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}'),
        [_OSLO],
    ),
    "arguments as a text first": (
        _wrapped('{"arguments": "{\\"city\\": \\"Oslo\\"}", "name": "get_weather"}'),
        [_OSLO],
    ),
    "no arguments": (_wrapped('{"name": "now"}'), [("call", "now", {})]),
    "null arguments": (_wrapped('{"name": "now", "arguments": null}'), [("call", "now", {})]),
    "empty arguments": (_wrapped('{"name": "now", "arguments": ""}'), [("call", "now", {})]),
    "arguments beside the name": (_wrapped('{"name": "get_weather", "city": "Oslo"}'), [_OSLO]),
    "no name": (_wrapped('{"city": "Oslo"}'), [_OSLO]),
    "no name but arguments": (_wrapped('{"arguments": {"city": "Oslo"}}'), [_OSLO]),
    "python": (
        _wrapped("{'name': 'plot', 'arguments': {'is_log': True, 'title': None, 'scale': 1.5,}}"),
        [("call", "plot", {"is_log": True, "title": None, "scale": 1.5})],
    ),
    "trailing commas": (
        _wrapped('{"name": "plot", "arguments": {"points": [1, 2,], "scale": 2,},}'),
        [("call", "plot", {"points": [1, 2], "scale": 2})],
    ),
    "quotes within": (
        _wrapped('{"name": "get_weather", "arguments": {"city": "the "old" Oslo"}}'),
        [("call", "get_weather", {"city": 'the "old" Oslo'})],
    ),
    "lines within": (
        _wrapped('{"name": "write_file", "arguments": {"path": "a", "content": "x\n\ty"}}'),
        [("call", "write_file", {"path": "a", "content": "x\n\ty"})],
    ),
    "escapes that are none": (
        _wrapped(r'{"name": "write_file", "arguments": {"path": "C:\dir", "content": "it\'s \d"}}'),
        [("call", "write_file", {"path": "C:\\dir", "content": "it's \\d"})],
    ),
    "a tag within a string": (
        _wrapped('{"name": "get_weather", "arguments": {"city": "</tool_call>"}}'),
        [("call", "get_weather", {"city": "</tool_call>"})],
    ),
    "blanks in the name": (_wrapped(_JSON_OSLO.replace("get_weather", " get_weather\\n")), [_OSLO]),
    "another spelling": (_wrapped(_JSON_OSLO.replace("get_weather", "functions.Get-Weather")), [_OSLO]),
    "the name before the object": (_wrapped('get_weather\n{"city": "Oslo"}'), [_OSLO]),
    "an unknown tool": (
        _wrapped('{"name": "fly", "arguments": {"to": "Oslo"}}'),
        [("call", "fly", {"to": "Oslo"})],
    ),
    "an unknown tool in xml": (
        _wrapped("<function=fly>\n<parameter=to>\nOslo\n</parameter>\n</function>"),
        [("call", "fly", {"to": "Oslo"})],
    ),
    "xml without tool_call": (_XML_OSLO, [_OSLO]),
    "xml without its beginning": (
        f"I will look.\n\n{_XML_OSLO}\n</tool_call>",
        [("content", "I will look."), _OSLO],
    ),
    "xml without any end": ("<tool_call>\n" + _XML_OSLO.partition("\n</p")[0], [_OSLO]),
    "xml without the function's end": (_wrapped(_XML_OSLO.partition("\n</f")[0]), [_OSLO]),
    "xml without the parameter's end": (_wrapped(_XML_OSLO.replace("</parameter>\n", "")), [_OSLO]),
    "xml without ends between": (
        _wrapped("<function=write_file>\n<parameter=path>\na\n<parameter=content>\nb\n</function>"),
        [("call", "write_file", {"path": "a", "content": "b"})],
    ),
    "xml in one line": (_wrapped(_XML_OSLO.replace("\n", "")), [_OSLO]),
    "xml in one line without tool_call": (_XML_OSLO.replace("\n", ""), [_OSLO]),
    "xml with a missing bracket": (_wrapped(_XML_OSLO.replace("weather>", "weather")), [_OSLO]),
    "xml with attributes": (
        _wrapped('<function name="get_weather"><parameter name="city">Oslo</parameter></function>'),
        [_OSLO],
    ),
    "xml with blanks in names": (
        _wrapped(_XML_OSLO.replace("=get_weather", "= get_weather ").replace("=city", "= city")),
        [_OSLO],
    ),
    "xml with too many ends": (
        _wrapped(_XML_OSLO + "\n</function>\n</function_invocation>"),
        [_OSLO],
    ),
    "xml with a parameter's end too many": (
        _wrapped(_XML_OSLO.replace("</parameter>", "</parameter>\n</parameter>")),
        [_OSLO],
    ),
    "xml with an object": (_wrapped('<function=get_weather>\n{"city": "Oslo"}\n</function>'), [_OSLO]),
    "xml with a parameter twice": (
        _wrapped(_XML_OSLO.replace("</function>", "<parameter=city>\nRome\n</parameter>\n</function>")),
        [_OSLO],
    ),
    "two functions in one": (_wrapped(_XML_OSLO + "\n" + _XML_OSLO), [_OSLO, _OSLO]),
    "parameters without a function": (
        _wrapped("<parameter=path>\na\n</parameter>\n<parameter=content>\nb\n</parameter>"),
        [("call", "write_file", {"path": "a", "content": "b"})],
    ),
}


@pytest.mark.parametrize(("text", "found"), _DRIFT.values(), ids=_DRIFT)
def test_a_call_is_understood_in_spite_of(text, found):
    assert _read(text) == found


@pytest.mark.parametrize("end", ["", "\n</think>", "\n</think>\n\n"])
@pytest.mark.parametrize("calls", [[_JSON_OSLO], [_XML_OSLO], [_JSON_OSLO, _XML_OSLO]])
def test_calls_that_end_the_reasoning_are_calls(calls, end):
    text = "I will look.\n\n" + "\n".join(map(_wrapped, calls)) + end
    assert _read(text, thinking=True) == [("reasoning", "I will look."), *([_OSLO] * len(calls))]


def test_a_function_without_tool_call_may_end_the_reasoning():
    assert _read(f"Hm.\n{_XML_OSLO}", thinking=True) == [("reasoning", "Hm."), _OSLO]


@pytest.mark.parametrize("after", ["\nOr not.\n</think>\n\nNo.", "\n</think>\n\nNo."])
def test_calls_that_are_only_thought_of_stay_reasoning(after):
    thought = f"I could call\n{_wrapped(_JSON_OSLO)}"
    found = _read(thought + after, thinking=True)
    reasoning = (thought + after).partition("\n</think>")[0]
    assert found == [("reasoning", reasoning), ("content", "No.")]


@pytest.mark.parametrize(
    "example",
    [
        "<tool_call>\n" + _JSON_OSLO[:-3],
        "<tool_call>\n{...",
        "<tool_call>\n<function=get_weather>\n<parameter=city>",
    ],
)
def test_a_broken_call_in_the_reasoning_does_not_swallow_the_answer(example):
    text = f"They look like\n{example}\nand so on.\n</think>\n\nYes.\n{_wrapped(_JSON_OSLO)}"
    found = _read(text, thinking=True)
    assert found == [("reasoning", text.partition("\n</think>")[0]), ("content", "Yes."), _OSLO]


def test_a_call_that_is_thought_of_and_then_made_is_made_once():
    text = f"I could call\n{_wrapped(_JSON_OSLO)}\n</think>\n\n{_wrapped(_XML_OSLO)}"
    assert _read(text, thinking=True) == [("reasoning", f"I could call\n{_wrapped(_JSON_OSLO)}"), _OSLO]


def test_a_parameter_may_contain_the_tags_of_parameters():
    content = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter> and so on\n</x>\n\n"
    text = _wrapped(
        f"<function=write_file>\n<parameter=path>\na\n</parameter>\n<parameter=content>\n{content}\n"
        "</parameter>\n</function>"
    )
    assert _read(text) == [("call", "write_file", {"path": "a", "content": content})]


def test_broken_calls_without_end_are_read_in_linear_time():
    text = '<tool_call>{"' * 20_000
    assert _read(text) == [("content", text)]


# Types


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("days", "3", 3),
        ("days", "3.0", 3),
        ("days", "three", "three"),
        ("days", "3.5", "3.5"),
        ("city", "5", "5"),
        ("city", "null", "null"),
        ("city", '"Oslo"', '"Oslo"'),
        ("elsewhere", "5", "5"),
    ],
)
def test_parameters_of_xml_become_the_declared_types(key, written, value):
    text = _wrapped(f"<function=get_weather>\n<parameter={key}>\n{written}\n</parameter>\n</function>")
    assert _read(text) == [("call", "get_weather", {key: value})]


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("title", "null", None),
        ("title", "None", None),
        ("title", "nullify", "nullify"),
        ("title", "A", "A"),
        ("points", "[1, 2.5]", [1, 2.5]),
        ("points", "\n[1,\n 2]\n", [1, 2]),
        ("points", "(1, 2)", "(1, 2)"),
        ("scale", "1e3", 1000.0),
        ("scale", "7", 7),
        ("is_log", "True", True),
        ("is_log", "false", False),
        ("is_log", "perhaps", "perhaps"),
        ("options", '{"a": {"b": 1}}', {"a": {"b": 1}}),
        ("options", "{'a': None}", {"a": None}),
        ("options", '{"a": 1} and more', '{"a": 1} and more'),
        ("id", "7", 7),
        ("id", "x7", "x7"),
        ("anything", "[1]", [1]),
        ("anything", "word", "word"),
    ],
)
def test_parameters_of_xml_become_one_of_several_types(key, written, value):
    text = _wrapped(f"<function=plot>\n<parameter={key}>\n{written}\n</parameter>\n</function>")
    assert _read(text) == [("call", "plot", {key: value})]


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("title", '"7"', "7"),
        ("title", "7", "7"),
        ("title", "null", None),
        ("points", '"[1, 2]"', [1, 2]),
        ("points", "[1, 2]", [1, 2]),
        ("points", '"none"', "none"),
        ("scale", '"2.5"', 2.5),
        ("is_log", '"true"', True),
        ("is_log", "1", 1),
        ("options", '"{\\"a\\": 1}"', {"a": 1}),
        ("id", '"7"', "7"),
        ("id", "7", 7),
        ("anything", '"[1]"', "[1]"),
        ("unknown", "7", 7),
    ],
)
def test_values_of_json_become_one_of_the_declared_types(key, written, value):
    text = _wrapped(f'{{"name": "plot", "arguments": {{"{key}": {written}}}}}')
    assert _read(text) == [("call", "plot", {key: value})]


# Cut off


@pytest.mark.parametrize("body", [_JSON_OSLO, _XML_OSLO])
def test_a_call_that_is_cut_off_is_not_completed(body):
    whole = _wrapped(body)
    for length in range(len(whole)):
        found = read(_parser(), [whole[:length]], truncated=True)
        if found and found[0][0] == "call":
            arguments = found[0][2]
            assert '{"city": "Oslo"}'.startswith(arguments)
            assert len(found) == 1
        else:
            assert found == ([("content", whole[:length])] if length else [])


# Whatever comes


_PIECES = st.sampled_from(
    [
        "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=get_weather>", "<function=fly>",
        "</function>", "<parameter=city>", "<parameter=days>", "</parameter>", "\n", "\n\n", " ", "\r\n", "<",
        ">", "{", "}", "[", "]", '"', "'", ",", ":", "\\", "```json\n", "```", "Oslo", "3", "True", "null",
        '{"name": "get_weather", "arguments": {', '{"name": "', '"arguments"', "get_weather", "\\u00e9",
        "\\ud83d", "é😀", _JSON_OSLO, _XML_OSLO,
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
    found = read(_parser(prompt_tail=tail), pieces, truncated=truncated)
    assert found == read(_parser(prompt_tail=tail), ["".join(pieces)], truncated=truncated)
    assert found == read(_parser(prompt_tail=tail), "".join(pieces), truncated=truncated)


@settings(max_examples=400)
@given(text=_TEXTS, thinking=st.booleans())
def test_whatever_is_read_arguments_are_objects(text, thinking):
    found = read(_parser(prompt_tail="<think>" if thinking else ""), [text])
    for item in loaded(found):
        assert item[0] != "call" or isinstance(item[2], dict)


@settings(max_examples=400)
@given(text=_TEXTS)
def test_no_text_is_lost_where_nothing_is_a_call(text):
    found = read(_parser(), [text])
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
    text = _wrapped(json.dumps(call, indent=indent, ensure_ascii=ascii_only))
    found = read(_parser(), [text])
    assert loaded(found) == [("call", "free", arguments)]
    if indent is None and not ascii_only:
        assert found[0][2] == json.dumps(arguments, ensure_ascii=False)


@given(path=st.text(), content=st.text(), days=st.integers())
def test_xml_means_what_it_says(path, content, days):
    text = _wrapped(
        f"<function=write_file>\n<parameter=path>\n{path}\n</parameter>\n"
        f"<parameter=content>\n{content}\n</parameter>\n</function>"
    )
    assert _read(text) == [("call", "write_file", {"path": path, "content": content})]
    text = _wrapped(f"<function=get_weather>\n<parameter=days>\n{days}\n</parameter>\n</function>")
    assert _read(text) == [("call", "get_weather", {"days": days})]


def test_other_markers_of_reasoning_are_read_too():
    parser = OutputParser(ThinkMarkers("[THINK]", "[/THINK]"))
    assert read(parser, "[THINK]a [b] [/x][/THINK]c [d]") == [
        ("reasoning", "a [b] [/x]"),
        ("content", "c [d]"),
    ]


def test_the_number_of_calls_is_known():
    parser = _parser()
    events = parser.push(_wrapped(_JSON_OSLO) * 2)
    assert summary(events + parser.flush())
    assert parser.num_calls == 2
