"""Templates of the structure that families of models have, and the parsers that read back what they write."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa.engine.chat_template import ChatTemplate
from helexa.engine.output import OutputFormat
from helexa.errors import BadRequest
from support.model_output import TOOLS, loaded, read

_TURN = """\
{%- macro turn(role, text) %}{{ '<|im_start|>' + role + '\\n' + text + '<|im_end|>\\n' }}{% endmacro -%}
"""
# Earlier reasoning is dropped: only turns behind the last question keep theirs.
_LAST_QUESTION = """\
{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' and not message.content.startswith('<tool_response>') -%}
{%- set ns.last = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
"""
_RESPONSE = """\
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif -%}
"""
_REASONING = """\
{%- set thought = '' -%}
{%- if message.reasoning_content is string -%}{%- set thought = message.reasoning_content -%}{%- endif -%}
{%- if loop.index0 > ns.last and (thought or loop.last) -%}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}
{%- endif -%}
"""

HERMES = (
    _TURN
    + _LAST_QUESTION
    + """\
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif -%}
{{- 'Functions:\\n<tools>' -}}
{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor -%}
{{- '\\n</tools>\\nCall them as <tool_call>\\n{"name": …, "arguments": …}\\n</tool_call><|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}
{{- turn('system', messages[0].content) -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
{{- turn(message.role, message.content) -}}
{%- elif message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
"""
    + _REASONING
    + """\
{{- message.content.lstrip('\\n') -}}
{%- for call in message.tool_calls or [] -%}
{%- if not loop.first or message.content %}{{ '\\n' }}{% endif -%}
{%- if call.function %}{% set call = call.function %}{% endif -%}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' -}}
{%- if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif -%}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif message.role == 'tool' -%}
"""
    + _RESPONSE
    + """\
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""
)

_XML_CALLS = """\
{%- for call in message.tool_calls or [] -%}
{%- if call.function is defined %}{% set call = call.function %}{% endif -%}
{%- if loop.first and message.content | trim %}{{ '\\n\\n' }}{% elif not loop.first %}{{ '\\n' }}{% endif -%}
{{- '<tool_call>\\n<function=' + call.name + '>\\n' -}}
{%- for name, value in call.arguments | items -%}
{{- '<parameter=' + name + '>\\n' -}}
{%- set value = value if value is string else value | tojson -%}
{{- value + '\\n</parameter>\\n' -}}
{%- endfor -%}
{{- '</function>\\n</tool_call>' -}}
{%- endfor -%}
"""
CODER = (
    _TURN
    + """\
{%- macro others(node, known) -%}
{%- for key in node if key not in known -%}
{%- if node[key] is mapping or (node[key] is sequence and node[key] is not string) -%}
{{- '\\n<' ~ key ~ '>' ~ (node[key] | tojson | safe) ~ '</' ~ key ~ '>' -}}
{%- else -%}
{{- '\\n<' ~ key ~ '>' ~ (node[key] | string) ~ '</' ~ key ~ '>' -}}
{%- endif -%}
{%- endfor -%}
{%- endmacro -%}
{%- if messages[0].role == 'system' -%}
{%- set system, rest = messages[0].content, messages[1:] -%}
{%- else -%}
{%- set system, rest = '', messages -%}
{%- endif -%}
{%- if tools is iterable and tools | length > 0 -%}
{{- '<|im_start|>system\\n' + system + '<tools>' -}}
{%- for tool in tools -%}
{%- if tool.function is defined %}{% set tool = tool.function %}{% endif -%}
{{- '\\n<function>\\n<name>' ~ tool.name ~ '</name>' -}}
{%- if tool.description is defined -%}
{{- '\\n<description>' ~ (tool.description | trim) ~ '</description>' -}}
{%- endif -%}
{%- if tool.parameters is defined and tool.parameters is mapping and tool.parameters.properties is mapping -%}
{%- for name, field in tool.parameters.properties | items -%}
{{- '\\n<parameter>\\n<name>' ~ name ~ '</name>' -}}
{%- if field.type is defined %}{{ '\\n<type>' ~ (field.type | string) ~ '</type>' }}{% endif -%}
{{- others(field, ['name', 'type', 'description']) ~ '\\n</parameter>' -}}
{%- endfor -%}
{%- endif -%}
{{- '\\n</function>' -}}
{%- endfor -%}
{{- '\\n</tools>\\nCall them as <tool_call>\\n<function=name>\\n<parameter=name>…<|im_end|>\\n' -}}
{%- elif system -%}
{{- turn('system', system) -}}
{%- endif -%}
{%- for message in rest -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if message.content is defined and message.content is string %}{{ message.content | trim }}{% endif -%}
"""
    + _XML_CALLS
    + """\
{{- '<|im_end|>\\n' -}}
{%- elif message.role == 'tool' -%}
"""
    + _RESPONSE.replace("messages[", "rest[")
    + """\
{%- else -%}
{{- turn(message.role, message.content) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
)

THINKING_CODER = (
    _TURN
    + """\
{%- macro said(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if 'text' in part %}{{ part.text }}{% else %}{{ raise_exception('unknown part') }}{% endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- if ns.last < 0 %}{{ raise_exception('there is no question') }}{% endif -%}
{%- if tools -%}
{{- '<|im_start|>system\\n<tools>' -}}
{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor -%}
{{- '\\n</tools>\\nCall them as <tool_call>\\n<function=name>\\n<parameter=name>…' -}}
{%- if messages[0].role == 'system' %}{{ '\\n\\n' + said(messages[0].content) | trim }}{% endif -%}
{{- '<|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}
{{- turn('system', said(messages[0].content) | trim) -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- if not loop.first %}{{ raise_exception('the system speaks first') }}{% endif -%}
{%- elif message.role == 'user' -%}
{{- turn('user', said(message.content) | trim) -}}
{%- elif message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
"""
    + _REASONING
    + """\
{{- said(message.content) | trim -}}
"""
    + _XML_CALLS
    + """\
{{- '<|im_end|>\\n' -}}
{%- elif message.role == 'tool' -%}
{%- set message = {'content': said(message.content)} -%}
"""
    + _RESPONSE
    + """\
{%- else -%}
{{- raise_exception('unknown role ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- else -%}
{{- '<think>\\n' -}}
{%- endif -%}
{%- endif -%}
"""
)

_FAMILIES = {"hermes": HERMES, "coder": CODER, "thinking coder": THINKING_CODER}
_EACH = pytest.mark.parametrize("source", _FAMILIES.values(), ids=_FAMILIES)
_XML = pytest.mark.parametrize("source", [CODER, THINKING_CODER], ids=["coder", "thinking coder"])


def _call(name, arguments, number=1):
    return {
        "id": f"call_{number}",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
    }


def _asked(*more):
    return [{"role": "user", "content": "How is it in Oslo?"}, *more]


def _called(**fields):
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [_call("get_weather", {"city": "Oslo"})],
        **fields,
    }


_HERMES_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
_XML_CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
)


@pytest.mark.parametrize(
    ("source", "capabilities", "tool_calls"),
    [
        (HERMES, {"tool_call": True, "reasoning": True}, "hermes"),
        (CODER, {"tool_call": True, "reasoning": False}, "qwen_xml"),
        (THINKING_CODER, {"tool_call": True, "reasoning": True}, "qwen_xml"),
    ],
    ids=_FAMILIES,
)
def test_the_format_is_known_by_the_template(source, capabilities, tool_calls):
    found = OutputFormat.detect(source)
    assert found.capabilities == capabilities
    assert found.tool_calls == tool_calls


@_EACH
def test_tools_are_written_without_what_is_null(source):
    function = {"name": "now", "description": None, "parameters": None, "strict": None}
    text = ChatTemplate(source).render(_asked(), tools=[{"type": "function", "function": function}])
    head = text.partition("<|im_end|>")[0]
    assert "now" in head
    assert "null" not in head
    assert "None" not in head


@_EACH
@pytest.mark.parametrize("content", [None, ""])
def test_a_call_without_content_is_only_the_call(source, content):
    text = ChatTemplate(source).render(_asked(_called(content=content)), add_generation_prompt=False)
    call = _HERMES_CALL if source == HERMES else _XML_CALL
    assert text.endswith(f"{call}<|im_end|>\n")
    assert text.removesuffix(f"{call}<|im_end|>\n").endswith(("assistant\n", "<think>\n\n</think>\n\n"))


@_EACH
def test_results_of_tools_are_in_one_turn(source):
    results = [
        {"role": "tool", "tool_call_id": "call_1", "content": "12 °C"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "rain"}]},
    ]
    text = ChatTemplate(source).render(_asked(_called(), *results), tools=TOOLS)
    assert (
        "<|im_end|>\n<|im_start|>user\n<tool_response>\n12 °C\n</tool_response>"
        "\n<tool_response>\nrain\n</tool_response><|im_end|>\n<|im_start|>assistant\n" in text
    )


@pytest.mark.parametrize("source", [HERMES, THINKING_CODER], ids=["hermes", "thinking coder"])
def test_reasoning_that_is_sent_back_stands_before_the_call(source):
    thought = _called(reasoning_content="I will look.")
    result = {"role": "tool", "content": "12 °C"}
    text = ChatTemplate(source).render(_asked(thought, result), tools=TOOLS)
    call = _HERMES_CALL if source == HERMES else _XML_CALL
    assert f"<|im_start|>assistant\n<think>\nI will look.\n</think>\n\n{call}<|im_end|>" in text
    later = ChatTemplate(source).render(_asked(thought, result, {"role": "user", "content": "And Rome?"}))
    assert "I will look." not in later


@_EACH
def test_a_developer_and_a_system_are_both_heard(source):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        *_asked(),
        {"role": "system", "content": "It is noon."},
    ]
    text = ChatTemplate(source).render(messages, tools=TOOLS)
    places = [text.find(words) for words in ("Be brief.", "Be kind.", "How is it in Oslo?", "It is noon.")]
    assert -1 not in places
    assert places == sorted(places)


@pytest.mark.parametrize("text", ['{"city": "Os', "Oslo", "[1]", '{"city": "Oslo"'])
@_XML
def test_arguments_that_are_no_object_do_not_end_a_conversation(source, text):
    message = _called(content="")
    message["tool_calls"][0]["function"]["arguments"] = text
    written = ChatTemplate(source).render(_asked(message, {"role": "tool", "content": "no"}))
    assert "<function=get_weather>\n<parameter=" in written
    assert "Os" in written.partition("<parameter=")[2] or "[1]" in written


def test_arguments_that_are_no_object_stay_as_they_came_where_that_is_possible():
    message = _called(content="")
    message["tool_calls"][0]["function"]["arguments"] = '{"city": "Os'
    assert '"arguments": {"city": "Os}' in ChatTemplate(HERMES).render(_asked(message))


@pytest.mark.parametrize(
    ("source", "variables", "starts"),
    [
        (HERMES, {}, False),
        (HERMES, {"enable_thinking": False}, False),
        (THINKING_CODER, {}, True),
        (THINKING_CODER, {"enable_thinking": False}, False),
        (CODER, {}, False),
    ],
)
def test_the_prompt_says_whether_the_model_begins_in_its_reasoning(source, variables, starts):
    text = ChatTemplate(source).render(_asked(), **variables)
    found = OutputFormat.detect(source)
    assert found.starts_in_reasoning(text) is starts
    assert found.parser(prompt_tail=text[-20:]).is_in_reasoning is starts


def test_words_of_a_user_do_not_begin_reasoning():
    text = ChatTemplate(HERMES).render([{"role": "user", "content": "What is <think>"}])
    assert not OutputFormat.detect(HERMES).starts_in_reasoning(text)


def test_a_template_that_misses_a_question_says_so():
    with pytest.raises(BadRequest, match="there is no question"):
        ChatTemplate(THINKING_CODER).render([{"role": "system", "content": "Be brief."}])


_WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1).filter(
    lambda text: text == text.strip()
)
_CITY = st.text(st.characters(codec="utf-8", exclude_characters="<"))
_POINTS = st.lists(st.floats(-1, 1))


@_EACH
@settings(max_examples=60, deadline=None)
@given(
    thought=_WORDS,
    said=st.just("") | _WORDS,
    city=_CITY,
    days=st.integers(),
    points=st.lists(st.floats(-1, 1)),
)
def test_what_a_template_writes_is_read_back_as_that_turn(source, thought, said, city, days, points):
    calls = [("get_weather", {"city": city, "days": days}), ("plot", {"points": points, "is_log": True})]
    message = {
        "role": "assistant",
        "content": said,
        "reasoning_content": thought,
        "tool_calls": [_call(name, arguments, number) for number, (name, arguments) in enumerate(calls)],
    }
    template, form = ChatTemplate(source), OutputFormat.detect(source)
    prompt = template.render(_asked(), tools=TOOLS)
    whole = template.render(_asked(message), tools=TOOLS, add_generation_prompt=False)
    assert whole.startswith(prompt)
    generated = whole.removeprefix(prompt).removesuffix("<|im_end|>\n")
    found = loaded(read(form.parser(tools=TOOLS, prompt_tail=prompt), [generated]))
    assert [item for item in found if item[0] == "call"] == [("call", *call) for call in calls]
    assert "".join(item[1] for item in found if item[0] == "content") == said.strip(" \t\r\n")
    reasoning = thought if form.reasoning else ""
    assert "".join(item[1] for item in found if item[0] == "reasoning") == reasoning
