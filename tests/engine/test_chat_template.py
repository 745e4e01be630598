"""Chat templates: what they see, what they write, how they fail, and how much they may take."""

import json
import threading
from datetime import datetime

import pytest

from helexa.engine import template_sandbox
from helexa.engine.chat_template import CHATML, ChatTemplate
from helexa.engine.tokenizer import Tokenizer
from helexa.errors import BadRequest, InvalidFile, InvalidParameter
from helexa.weights.pre_tokenizers import PRE_TOKENIZERS

_HELLO = [{"role": "user", "content": "Hello"}]
_SHOW = "{% for message in messages %}[{{ message.role }}:{{ message.content }}]{% endfor %}"


def _render(source, messages=_HELLO, **keywords):
    return ChatTemplate(source, "<s>", "</s>").render(messages, **keywords)


# What a template sees


def test_messages_special_tokens_and_the_generation_prompt_are_there():
    source = "{{ bos_token }}" + _SHOW + "{% if add_generation_prompt %}>{% endif %}{{ eos_token }}"
    assert _render(source) == "<s>[user:Hello]></s>"
    assert _render(source, add_generation_prompt=False) == "<s>[user:Hello]</s>"


def test_whitespace_is_trimmed_as_in_transformers():
    assert _render("{% if true %}\n  {% if true %}\n a\n  {% endif %}\n{% endif %}\nb\n") == " a\nb"


def test_further_variables_reach_the_template():
    source = "{% if enable_thinking is defined and enable_thinking is false %}quiet{% else %}aloud{% endif %}"
    assert _render(source, enable_thinking=False) == "quiet"
    assert _render(source) == "aloud"
    assert ChatTemplate("{{ self_ }}{{ messages[0].role }}").render(_HELLO, **{"self_": 1}) == "1user"


def test_tools_are_written_as_json_with_all_letters_kept():
    tools = [{"type": "function", "function": {"name": "grüß", "parameters": {"a<b": 1.0}}}]
    assert _render("{{ tools | tojson }}", tools=tools) == json.dumps(tools, ensure_ascii=False)
    assert _render("{{ tools | tojson(indent=2) }}", tools=tools) == json.dumps(
        tools, ensure_ascii=False, indent=2
    )
    assert _render("{{ tools is none }}") == "True"
    assert _render("{{ tools is none }}", tools=[]) == "True"


def test_fields_of_tools_that_a_template_takes_for_granted_are_there():
    tools = [{"type": "function", "function": {"name": "now", "description": None}}]
    source = """
{%- for tool in tools -%}
{{- tool.function.name + ': ' + tool.function.description ~ (tool.function.parameters.properties | tojson) -}}
{%- endfor -%}"""
    assert _render(source, tools=tools) == "now: {}"
    assert (
        _render("{{ tools | tojson }}", tools=tools) == '[{"type": "function", "function": {"name": "now"}}]'
    )


def test_a_template_for_tools_is_used_when_there_are_tools():
    template = ChatTemplate("plain", tool_use="with tools")
    assert template.render(_HELLO) == "plain"
    assert template.render(_HELLO, tools=[{"type": "function"}]) == "with tools"


def test_methods_of_texts_namespaces_loop_controls_and_macros_work():
    source = """
{%- macro shout(text) %}{{ text.upper() + '!' }}{% endmacro -%}
{%- set ns = namespace(last='', count=0) -%}
{%- for message in messages[::-1] -%}
{%- if message.content.startswith('skip') %}{% continue %}{% endif -%}
{%- set ns.last = message.content.split('</think>')[-1].lstrip('\\n') -%}
{%- set ns.count = ns.count + loop.index -%}
{%- if ns.count > 3 %}{% break %}{% endif -%}
{{ shout(ns.last) ~ loop.last }}
{%- endfor -%}
"""
    messages = [{"role": "user", "content": text} for text in ("a", "skip b", "<think>x</think>\nc")]
    assert _render(source, messages) == "C!False"


def test_the_training_mark_around_the_assistants_text_is_only_a_block():
    assert _render("a{% generation %}b{{ messages[0].role }}{% endgeneration %}c") == "abuserc"


def test_recursive_loops_tick_too():
    source = "{% for item in tree recursive %}{{ item.n }}{{ loop(item.c) if item.c }}{% endfor %}"
    assert _render(source, tree=[{"n": 1, "c": [{"n": 2}, {"n": 3}]}]) == "123"


def test_filters_of_texts_do_what_they_do_in_jinja():
    assert _render("{{ ['a', 1, none] | join(', ') }}") == "a, 1, None"
    assert _render("{{ messages | join('-', attribute='role') }}", _HELLO * 2) == "user-user"
    assert _render("{{ 'abab' | replace('a', 'c') }}{{ 'abab'.replace('a', 'c', 1) }}") == "cbcbcbab"
    assert (
        _render("{{ ', '.join(['x', 'y']) }}{{ 'a\n\nb' | indent(2) }}|{{ 'a' | indent(2, true) }}")
        == "x, ya\n\n  b|  a"
    )
    assert _render("{{ ' a ' | trim | upper }}{{ messages | map(attribute='role') | list }}") == "A['user']"
    assert _render("{{ '%s-%d' % ('a', 5) }}{{ '{:>3}'.format(7) }}{{ 2 ** 10 + 3 * 2 }}") == "a-5  71030"


def test_methods_of_texts_work_in_loops_with_variables():
    source = (
        "{% for m in messages %}{% set x = m.role %}{{ x.replace('u', '-') }}{{ '.'.join(x) }}{% endfor %}"
    )
    assert _render(source) == "-seru.s.e.r"


def test_the_date_is_that_of_today():
    assert _render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


def test_the_same_messages_give_the_same_bytes_every_time():
    template = ChatTemplate("{{ tools | tojson }}{{ {'b': 1, 'a': 2} | tojson }}" + _SHOW)
    tools = [{"z": 1, "a": {"y": 2, "b": 3}}]
    assert {template.render(_HELLO, tools=tools) for _ in range(5)} == {
        '[{"z": 1, "a": {"y": 2, "b": 3}}]{"b": 1, "a": 2}[user:Hello]'
    }


# What becomes of messages


def test_parts_become_a_text_where_the_template_expects_one():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert _render(_SHOW, [{"role": "user", "content": parts}]) == "[user:Hello]"


def test_parts_stay_parts_where_the_template_takes_them():
    source = """
{%- for message in messages -%}
{%- if message.content is string %}{{ message.content }}{% else -%}
{%- for part in message.content %}<{{ part.text }}>{% endfor %}{% endif -%}
{%- endfor -%}"""
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert _render(source, [{"role": "user", "content": parts}]) == "<Hel><lo>"
    assert _render(source, [{"role": "user", "content": []}]) == ""
    assert _render(source) == "Hello"


def test_a_refusal_that_a_client_sends_back_is_text():
    parts = [{"type": "refusal", "refusal": "I will not."}, {"type": "output_text", "text": " Sorry."}]
    assert _render(_SHOW, [{"role": "assistant", "content": parts}]) == "[assistant:I will not. Sorry.]"


def test_a_text_part_without_its_text_is_refused():
    with pytest.raises(InvalidParameter, match="'refusal'; it has no text"):
        _render(_SHOW, [{"role": "assistant", "content": [{"type": "refusal", "text": "x"}]}])


def test_content_that_is_not_text_is_refused_with_its_place():
    parts = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(InvalidParameter, match="'image_url'; this model reads only text") as caught:
        _render(_SHOW, [*_HELLO, {"role": "user", "content": parts}])
    assert caught.value.param == "messages[1].content[1]"


def test_a_message_without_content_has_an_empty_one_and_no_empty_fields():
    message = {"role": "assistant", "content": None, "tool_calls": None}
    assert _render("{{ 'tool_calls' in messages[0] }}" + _SHOW, [message]) == "False[assistant:]"


def test_arguments_of_tool_calls_are_objects_and_the_callers_messages_stay_as_they_were():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "é"]}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    before = json.dumps(messages)
    walk = "{% for k, v in call.function.arguments.items() %}{{ k }}={{ v | tojson }}{% endfor %}"
    source = "{% for call in messages[0].tool_calls %}" + walk + "{% endfor %}"
    assert _render(source, messages) == 'a=[1, "é"]'
    assert json.dumps(messages) == before


@pytest.mark.parametrize("arguments", [None, "", "{}"])
def test_missing_arguments_are_an_empty_object(arguments):
    messages = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
    assert _render("{{ messages[0].tool_calls[0].function.arguments | tojson }}", messages) == "{}"


@pytest.mark.parametrize("arguments", ["not json", "[1]", '"text"'])
def test_arguments_that_are_no_object_stay_as_they_came(arguments):
    messages = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
    source = "{% for call in messages[-1].tool_calls or [] %}{{ call.function.arguments }}{% endfor %}"
    assert _render(source, messages) == arguments


def test_a_developer_is_the_system_unless_the_template_knows_developers():
    message = {"role": "developer", "content": "x"}
    assert _render(_SHOW, [message]) == "[system:x]"
    assert _render(_SHOW + "{# developer #}", [message]) == "[developer:x]"


# Files


def _tokenizer(*control):
    tokens = ["a", "<s>", *control]
    return Tokenizer(tokens, [1, 3, *[3] * len(control)], [], PRE_TOKENIZERS["gpt-2"], bos_token_id=1)


_ONE_SYSTEM = (
    "{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system speaks first') }}{% endif %}{% endfor %}" + _SHOW
)
_MANY_SYSTEMS = [
    {"role": "system", "content": "one"},
    {"role": "developer", "content": "two"},
    {"role": "user", "content": "Hello"},
    {"role": "system", "content": "three"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "system", "content": "four"},
]


def test_system_messages_that_a_template_refuses_are_said_where_they_stand():
    assert _render(_ONE_SYSTEM, _MANY_SYSTEMS) == (
        "[system:one\n\ntwo][user:Hello\n\nthree][assistant:Yes?][user:four]"
    )


def test_system_messages_that_a_template_ignores_are_not_lost():
    source = _SHOW.replace("message in messages", "message in messages if message.role != 'system'")
    assert _render(source, _MANY_SYSTEMS[2:]) == "[user:Hello\n\nthree][assistant:Yes?][user:four]"


def test_system_messages_stay_where_the_template_takes_them():
    assert _render(_SHOW, _MANY_SYSTEMS) == (
        "[system:one][system:two][user:Hello][system:three][assistant:Yes?][system:four]"
    )


def test_a_late_system_message_joins_the_parts_of_a_user():
    source = (
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{% for part in message.content %}<{{ part.text }}>{% endfor %}{% endfor %}"
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}, {"role": "system", "content": [parts[0]]}]
    assert _render(source, messages) == "<a><b><\n\n><a>"
    assert messages[0]["content"] == parts


def test_the_template_of_a_file_is_used_with_the_files_tokens():
    template = ChatTemplate.from_gguf(
        {"tokenizer.chat_template": "{{ bos_token }}{{ eos_token }}!"}, _tokenizer()
    )
    assert template.render(_HELLO) == "<s>!"


def test_a_file_with_the_tokens_of_chatml_and_no_template_speaks_chatml():
    template = ChatTemplate.from_gguf({}, _tokenizer("<|im_start|>", "<|im_end|>"))
    assert template.source == CHATML
    messages = [{"role": "system", "content": "Be brief. "}, *_HELLO]
    assert template.render(messages) == (
        "<|im_start|>system\nBe brief. <|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.render(_HELLO, add_generation_prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"


def test_a_file_with_neither_has_no_template():
    assert ChatTemplate.from_gguf({}, _tokenizer()) is None


def test_a_template_that_is_no_text_is_refused():
    with pytest.raises(InvalidFile, match="not a text"):
        ChatTemplate.from_gguf({"tokenizer.chat_template": 5}, _tokenizer())


# Failures


def test_a_template_that_refuses_the_messages_says_why():
    with pytest.raises(BadRequest, match="refused the messages: roles must alternate"):
        _render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.nothing.at_all }}",
        "{{ messages[0] + 1 }}",
        "{{ 1 / 0 }}",
        "{% include 'x' %}",
        "{{ messages[0].content() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_is_an_error_of_the_request(source):
    with pytest.raises(BadRequest, match=r"chat template refused the messages: ."):
        _render(source)


def test_a_syntax_error_is_refused_with_its_line():
    with pytest.raises(InvalidFile, match="wrong in line 2"):
        ChatTemplate("fine\n{% if %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% for a in b %}" * 50 + "{% endfor %}" * 50,
        "x" * (1 << 19),
    ],
)
def test_a_template_that_cannot_be_compiled_is_refused(source):
    with pytest.raises(InvalidFile, match="chat template"):
        ChatTemplate(source)


# A template is foreign code


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
        "{{ raise_exception.__globals__['json'].dumps }}{{ raise_exception.__globals__.json.dumps(1) }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_the_sandbox_holds(source):
    with pytest.raises(BadRequest):
        _render(source)


def _grown(start, step, use=""):
    """A template that does `step` to ns.x a hundred times."""
    return f"{{% set ns = namespace(x={start}) %}}{{% for i in range(99) %}}{step}{{% endfor %}}{use}"


_NEST = ("[1]", "{% set ns.x = [ns.x, ns.x] %}")
_BOMBS = [
    "{{ 'a' * 10 ** 12 }}",
    "{{ 10 ** 12 * 'a' }}",
    "{{ [0] * 10 ** 12 }}",
    "{{ 9 ** (9 ** 9) }}",
    _grown("3", "{% set ns.x = ns.x * ns.x %}"),
    _grown("'a'", "{% set ns.x = ns.x + ns.x %}"),
    _grown("'a'", "{% set ns.x = ns.x ~ ns.x %}"),
    _grown("[1]", "{% set ns.x = ns.x + ns.x %}"),
    _grown("'a'", "{% set ns.x = ns.x.replace('a', 'aa') %}"),
    _grown("'a'", "{% set ns.x = ns.x | replace('a', 'aa') %}"),
    _grown("'a'", "{% set ns.x = ns.x.join([ns.x, ns.x]) %}"),
    _grown("'a'", "{% set ns.x = [ns.x, ns.x] | join %}"),
    _grown("'a'", "{% set ns.x = '{0}{0}'.format(ns.x) %}"),
    _grown("'a'", "{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
    _grown("'a'", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    _grown("[1]", "{% set ns.x = {'a': ns.x, 'b': ns.x} %}", "{{ ns.x | string }}"),
    _grown(*_NEST, "{{ ns.x }}"),
    _grown(*_NEST, "{{ ns.x | tojson }}"),
    _grown(*_NEST, "{{ ns.x ~ '' }}"),
    _grown(*_NEST, "{{ ns.x | upper }}"),
    _grown(*_NEST, "{{ '%s' % ns.x }}"),
    "{{ 'a'.center(10 ** 11) }}",
    "{{ 'a'.zfill(10 ** 11) }}",
    "{{ 'a'.ljust(10 ** 11) }}",
    "{{ 'a\\tb'.expandtabs(10 ** 11) }}",
    "{{ 'a' | center(10 ** 11) }}",
    "{{ '%99999999999d' % 1 }}",
    "{{ '%*d' % (10 ** 9, 1) }}",
    "{{ '{:99999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "{{ strftime_now('%9999999999d') }}",
    "{{ 1.5 | round(10 ** 9, 'ceil') }}",
    "{% for i in range(99999) %}{{ 'abcdefghij' * 99 }}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{{ 'abcdefghij' * 9999 }}{% endfor %}{% endset %}",
]


@pytest.mark.parametrize("source", _BOMBS)
def test_a_template_that_swells_is_stopped(source):
    with pytest.raises(BadRequest):
        _render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set tick = 1 %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_never_ends_is_stopped(source, monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.2)
    with pytest.raises(BadRequest, match=r"takes more than 0\.2 seconds"):
        _render(source)


def test_threads_render_side_by_side():
    template, texts = ChatTemplate("{% for i in range(200) %}{{ messages[0].content ~ i }}{% endfor %}"), {}

    def run(name):
        texts[name] = {template.render([{"role": "user", "content": name}]) for _ in range(20)}

    threads = [threading.Thread(target=run, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {name: {"".join(f"{name}{i}" for i in range(200))} for name in "abc"}
