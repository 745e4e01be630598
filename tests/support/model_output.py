"""Tools to call, and what a parser finds in a text, in a form that is easy to write down."""

import json

from helexa.engine.output import Content, OutputFormat, Reasoning, ThinkMarkers, ToolArguments, ToolStart
from helexa.engine.output.events import joined


def function(name, properties=None, required=(), **parameters):
    schema = {"type": "object", "properties": properties or {}, "required": list(required), **parameters}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [
    function("get_weather", {"city": {"type": "string"}, "days": {"type": "integer"}}, ["city"]),
    function("write_file", {"path": {"type": "string"}, "content": {"type": "string"}}, ["path", "content"]),
    function(
        "plot",
        {
            "title": {"type": ["string", "null"]},
            "points": {"type": "array", "items": {"type": "number"}},
            "scale": {"type": "number"},
            "is_log": {"type": "boolean"},
            "options": {"type": "object"},
            "id": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
            "anything": {},
        },
    ),
    function("now"),
]


def summary(events):
    """Events without seams between pieces: ("reasoning" | "content", text), ("call", name, arguments)."""
    whole = []
    for event in events:
        joined(whole, event)
    found = []
    for event in whole:
        match event:
            case Reasoning(text):
                found.append(("reasoning", text))
            case Content(text):
                found.append(("content", text))
            case ToolStart(index, name):
                assert index == sum(item[0] == "call" for item in found)
                found.append(("call", name, ""))
            case ToolArguments(index, fragment):
                assert found[-1][0] == "call"
                assert index == sum(item[0] == "call" for item in found) - 1
                found[-1] = (*found[-1][:2], found[-1][2] + fragment)
    return found


def read(parser, pieces, *, truncated=False):
    """The summary of all that a parser makes of the pieces."""
    events = [event for piece in pieces for event in parser.push(piece)]
    return summary(events + parser.flush(truncated=truncated))


def loaded(found):
    """The same with arguments as Python has them."""
    return [(*item[:2], json.loads(item[2])) if item[0] == "call" else item for item in found]


THINK = ThinkMarkers("<think>", "</think>")
OSLO = ("call", "get_weather", {"city": "Oslo"})
JSON_OSLO = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
XML_OSLO = "<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>"


def make_parser(tools=TOOLS, *, prompt_tail=""):
    return OutputFormat(THINK, "hermes").parser(tools=tools, prompt_tail=prompt_tail)


def found_in(text, *, thinking=False, tools=TOOLS, truncated=False):
    """What the parser finds in `text`, which must not depend on how it is cut."""
    tail = "<|im_start|>assistant\n<think>\n" if thinking else "<|im_start|>assistant\n"
    whole = read(make_parser(tools, prompt_tail=tail), [text], truncated=truncated)
    single = read(make_parser(tools, prompt_tail=tail), text, truncated=truncated)
    assert whole == single
    return loaded(whole)


def wrapped(body):
    return f"<tool_call>\n{body}\n</tool_call>"
