"""Grammars in llguidance's dialect of Lark that have a model call tools in its own format, and well.

Such a grammar holds an answer to calls from its first character on. What it admits, the parser of this
package reads as calls with arguments of the declared types.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from helexa.engine.output.json_types import TEXT
from helexa.engine.output.tags import CLOSE, OPEN
from helexa.engine.output.tools import Tool, Tools
from helexa.errors import InvalidParameter

_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}
_READABLE = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}
_LOOK_AROUND = re.compile(r"\(\?<?[=!]|\\[1-9]")  # and references back: no automaton can follow them
_DEFINITIONS = ("$defs", "definitions")


def tool_grammar(
    tool_calls: str,
    tools: Sequence[Mapping[str, Any]],
    *,
    choice: str = "required",
    parallel: bool = True,
    response_schema: Mapping[str, Any] | None = None,
) -> str:
    """The grammar of an answer that calls tools.

    tool_calls: "hermes" or "qwen_xml".   choice: "required", the name of the only tool, or "auto" with a
    response_schema: the answer is either calls or JSON of that schema.   parallel: whether several calls
    may be made.   Raises InvalidParameter if there is no such tool.
    """
    chosen = _chosen(Tools(tools), choice)
    rules = [
        "start: LEAD? answer",
        # After its reasoning a model goes on with empty lines.
        r"LEAD: /\n{1,2}/",
        r'calls: call ("\n" call)*' if parallel else "calls: call",
        f"call: {_quoted(OPEN)} NEWLINE ({_any_of('tool', len(chosen))}) NEWLINE {_quoted(CLOSE)}",
        r'NEWLINE: "\n"',
    ]
    if response_schema is not None and choice == "auto":
        rules += ["answer: calls | json", f"json: {_json(response_schema, _READABLE)}"]
    else:
        rules.append("answer: calls")
    for number, tool in enumerate(chosen):
        rules += _hermes(number, tool) if tool_calls == "hermes" else _qwen_xml(number, tool)
    if tool_calls == "qwen_xml":
        rules += [
            f"text[suffix={_quoted('</parameter>')}]: /(?s:.*)/",
            f"key[suffix={_quoted('>')}]: /[A-Za-z_][A-Za-z0-9_.-]*/",
        ]
    return "\n".join(rules) + "\n"


def _chosen(tools: Tools, choice: str) -> list[Tool]:
    chosen = (
        list(tools) if choice in ("required", "auto") else [tool for tool in tools if tool.name == choice]
    )
    if not chosen:
        known = ", ".join(tool.name for tool in tools) or "none"
        message = f"'tool_choice' asks for {choice!r:.80}; the tools of the request are: {known:.400}"
        raise InvalidParameter(message, param="tool_choice")
    return chosen


def _hermes(number: int, tool: Tool) -> Iterable[str]:
    schema = {**_without_look_around(tool.parameters), "type": "object"}
    # What is not declared would be made up, unless the schema itself asks for it.
    if "properties" in schema and set(tool.required) <= set(tool.properties):
        schema.setdefault("additionalProperties", False)
    head = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "arguments": '
    yield f'tool_{number}: {_quoted(head)} arguments_{number} "}}"'
    yield f"arguments_{number}: {_json(schema, _COMPACT)}"


def _qwen_xml(number: int, tool: Tool) -> Iterable[str]:
    """Parameters in the order of their declaration."""
    required = set(tool.required)
    parts = []
    for place, (key, schema) in enumerate(tool.properties.items()):
        name = f"parameter_{number}_{place}"
        parts.append(name if key in required else f"{name}?")
        yield f"{name}: {_quoted(f'<parameter={key}>')} NEWLINE {_value(tool, key, schema)} NEWLINE"
    if tool.parameters.get("additionalProperties"):
        parts.append(f"more_{number}*")
        yield f'more_{number}: "<parameter=" key NEWLINE text NEWLINE'
    inner = " ".join(parts)
    yield f"tool_{number}: {_quoted(f'<function={tool.name}>')} NEWLINE {inner} {_quoted('</function>')}"


def _value(tool: Tool, key: str, schema: Any) -> str:
    types = tool.types(key) or TEXT
    if "string" not in types:
        definitions = {name: tool.parameters[name] for name in _DEFINITIONS if name in tool.parameters}
        whole = _without_look_around({**definitions, **schema})
        return f"{_json(whole, _COMPACT)} NEWLINE {_quoted('</parameter>')}"
    values = schema.get("enum") if isinstance(schema, Mapping) else None
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        options = " | ".join(_quoted(value) if value else '""' for value in values)
        return f"({options}) NEWLINE {_quoted('</parameter>')}"
    return "text"


def _without_look_around(schema: Any) -> Any:
    """A schema without the patterns that would have it refused as a whole; they are no more than hints."""
    if isinstance(schema, list):
        return [_without_look_around(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: _without_look_around(value)
        for key, value in schema.items()
        if not _LOOK_AROUND.search(value if key == "pattern" and isinstance(value, str) else key)
    }


def _json(schema: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)


def _any_of(name: str, count: int) -> str:
    return " | ".join(f"{name}_{number}" for number in range(count))


def _quoted(text: str) -> str:
    """A literal of Lark: its escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)
