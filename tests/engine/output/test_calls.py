"""Calls as models write them: what they stray into, the types of their arguments, and their ends."""

import json

import pytest

from support.model_output import JSON_OSLO, OSLO, XML_OSLO, found_in, make_parser, read, wrapped

# What models make of it


_DRIFT = {
    "no end": ("<tool_call>\n" + JSON_OSLO, [OSLO]),
    "no end, and another": (f"<tool_call>\n{JSON_OSLO}\n" * 2, [OSLO, OSLO]),
    "no end, and text": (f"<tool_call>\n{JSON_OSLO}\nThere.", [OSLO, ("content", "There.")]),
    "no end of the object": (wrapped(JSON_OSLO[:-1]), [OSLO]),
    "no end of the arguments": (wrapped(JSON_OSLO[:-2]), [OSLO]),
    "no end of anything": ("<tool_call>" + JSON_OSLO[:-2], [OSLO]),
    "a bracket too many": (wrapped(JSON_OSLO + "}"), [OSLO]),
    "no beginning": (JSON_OSLO + "\n</tool_call>", [OSLO]),
    "no beginning behind text": (
        f"I will look.\n{JSON_OSLO}\n</tool_call>",
        [("content", "I will look."), OSLO],
    ),
    "neither beginning nor end": (JSON_OSLO, [OSLO]),
    "two beginnings": ("<tool_call>\n" + wrapped(JSON_OSLO), [OSLO]),
    "a fence within": (wrapped(f"```json\n{JSON_OSLO}\n```"), [OSLO]),
    "a fence instead": (f"```json\n{JSON_OSLO}\n```", [OSLO]),
    "two in one": (wrapped(f"{JSON_OSLO}\n{JSON_OSLO}"), [OSLO, OSLO]),
    "two in one with a comma": (wrapped(f"{JSON_OSLO},\n{JSON_OSLO}"), [OSLO, OSLO]),
    "a list": (wrapped(f"[{JSON_OSLO}, {JSON_OSLO}]"), [OSLO, OSLO]),
    "spread over lines": (wrapped(json.dumps(json.loads(JSON_OSLO), indent=4)), [OSLO]),
    "arguments first": (wrapped('{"arguments": {"city": "Oslo"}, "name": "get_weather"}'), [OSLO]),
    "parameters": (wrapped('{"name": "get_weather", "parameters": {"city": "Oslo"}}'), [OSLO]),
    "as in the api": (
        wrapped('{"id": "1", "type": "function", "function": ' + JSON_OSLO + "}"),
        [OSLO],
    ),
    "arguments as a text": (
        wrapped('{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}'),
        [OSLO],
    ),
    "arguments as a text first": (
        wrapped('{"arguments": "{\\"city\\": \\"Oslo\\"}", "name": "get_weather"}'),
        [OSLO],
    ),
    "no arguments": (wrapped('{"name": "now"}'), [("call", "now", {})]),
    "null arguments": (wrapped('{"name": "now", "arguments": null}'), [("call", "now", {})]),
    "empty arguments": (wrapped('{"name": "now", "arguments": ""}'), [("call", "now", {})]),
    "arguments beside the name": (wrapped('{"name": "get_weather", "city": "Oslo"}'), [OSLO]),
    "no name": (wrapped('{"city": "Oslo"}'), [OSLO]),
    "no name but arguments": (wrapped('{"arguments": {"city": "Oslo"}}'), [OSLO]),
    "python": (
        wrapped("{'name': 'plot', 'arguments': {'is_log': True, 'title': None, 'scale': 1.5,}}"),
        [("call", "plot", {"is_log": True, "title": None, "scale": 1.5})],
    ),
    "trailing commas": (
        wrapped('{"name": "plot", "arguments": {"points": [1, 2,], "scale": 2,},}'),
        [("call", "plot", {"points": [1, 2], "scale": 2})],
    ),
    "quotes within": (
        wrapped('{"name": "get_weather", "arguments": {"city": "the "old" Oslo"}}'),
        [("call", "get_weather", {"city": 'the "old" Oslo'})],
    ),
    "lines within": (
        wrapped('{"name": "write_file", "arguments": {"path": "a", "content": "x\n\ty"}}'),
        [("call", "write_file", {"path": "a", "content": "x\n\ty"})],
    ),
    "escapes that are none": (
        wrapped(r'{"name": "write_file", "arguments": {"path": "C:\dir", "content": "it\'s \d"}}'),
        [("call", "write_file", {"path": "C:\\dir", "content": "it's \\d"})],
    ),
    "a tag within a string": (
        wrapped('{"name": "get_weather", "arguments": {"city": "</tool_call>"}}'),
        [("call", "get_weather", {"city": "</tool_call>"})],
    ),
    "blanks in the name": (wrapped(JSON_OSLO.replace("get_weather", " get_weather\\n")), [OSLO]),
    "another spelling": (wrapped(JSON_OSLO.replace("get_weather", "functions.Get-Weather")), [OSLO]),
    "the name before the object": (wrapped('get_weather\n{"city": "Oslo"}'), [OSLO]),
    "an unknown tool": (
        wrapped('{"name": "fly", "arguments": {"to": "Oslo"}}'),
        [("call", "fly", {"to": "Oslo"})],
    ),
    "an unknown tool in xml": (
        wrapped("<function=fly>\n<parameter=to>\nOslo\n</parameter>\n</function>"),
        [("call", "fly", {"to": "Oslo"})],
    ),
    "xml without tool_call": (XML_OSLO, [OSLO]),
    "xml without its beginning": (
        f"I will look.\n\n{XML_OSLO}\n</tool_call>",
        [("content", "I will look."), OSLO],
    ),
    "xml without any end": ("<tool_call>\n" + XML_OSLO.partition("\n</p")[0], [OSLO]),
    "xml without the function's end": (wrapped(XML_OSLO.partition("\n</f")[0]), [OSLO]),
    "xml without the parameter's end": (wrapped(XML_OSLO.replace("</parameter>\n", "")), [OSLO]),
    "xml without ends between": (
        wrapped("<function=write_file>\n<parameter=path>\na\n<parameter=content>\nb\n</function>"),
        [("call", "write_file", {"path": "a", "content": "b"})],
    ),
    "xml in one line": (wrapped(XML_OSLO.replace("\n", "")), [OSLO]),
    "xml in one line without tool_call": (XML_OSLO.replace("\n", ""), [OSLO]),
    "xml with a missing bracket": (wrapped(XML_OSLO.replace("weather>", "weather")), [OSLO]),
    "xml with attributes": (
        wrapped('<function name="get_weather"><parameter name="city">Oslo</parameter></function>'),
        [OSLO],
    ),
    "xml with blanks in names": (
        wrapped(XML_OSLO.replace("=get_weather", "= get_weather ").replace("=city", "= city")),
        [OSLO],
    ),
    "xml with too many ends": (
        wrapped(XML_OSLO + "\n</function>\n</function_invocation>"),
        [OSLO],
    ),
    "xml with a parameter's end too many": (
        wrapped(XML_OSLO.replace("</parameter>", "</parameter>\n</parameter>")),
        [OSLO],
    ),
    "xml with an object": (wrapped('<function=get_weather>\n{"city": "Oslo"}\n</function>'), [OSLO]),
    "xml with a parameter twice": (
        wrapped(XML_OSLO.replace("</function>", "<parameter=city>\nRome\n</parameter>\n</function>")),
        [OSLO],
    ),
    "two functions in one": (wrapped(XML_OSLO + "\n" + XML_OSLO), [OSLO, OSLO]),
    "parameters without a function": (
        wrapped("<parameter=path>\na\n</parameter>\n<parameter=content>\nb\n</parameter>"),
        [("call", "write_file", {"path": "a", "content": "b"})],
    ),
}


@pytest.mark.parametrize(("text", "found"), _DRIFT.values(), ids=_DRIFT)
def test_a_call_is_understood_in_spite_of(text, found):
    assert found_in(text) == found


def test_a_parameter_may_contain_the_tags_of_parameters():
    content = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter> and so on\n</x>\n\n"
    text = wrapped(
        f"<function=write_file>\n<parameter=path>\na\n</parameter>\n<parameter=content>\n{content}\n"
        "</parameter>\n</function>"
    )
    assert found_in(text) == [("call", "write_file", {"path": "a", "content": content})]


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
    text = wrapped(f"<function=get_weather>\n<parameter={key}>\n{written}\n</parameter>\n</function>")
    assert found_in(text) == [("call", "get_weather", {key: value})]


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
    text = wrapped(f"<function=plot>\n<parameter={key}>\n{written}\n</parameter>\n</function>")
    assert found_in(text) == [("call", "plot", {key: value})]


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
    text = wrapped(f'{{"name": "plot", "arguments": {{"{key}": {written}}}}}')
    assert found_in(text) == [("call", "plot", {key: value})]


# Cut off


@pytest.mark.parametrize("body", [JSON_OSLO, XML_OSLO])
def test_a_call_that_is_cut_off_is_not_completed(body):
    whole = wrapped(body)
    for length in range(len(whole)):
        found = read(make_parser(), [whole[:length]], truncated=True)
        if found and found[0][0] == "call":
            arguments = found[0][2]
            assert '{"city": "Oslo"}'.startswith(arguments)
            assert len(found) == 1
        else:
            assert found == ([("content", whole[:length])] if length else [])
