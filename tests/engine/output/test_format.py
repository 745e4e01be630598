"""The format of a model, by its template and its vocabulary."""

import pytest

from helexa.engine.output import OutputFormat, ThinkMarkers

_THINK = ThinkMarkers("<think>", "</think>")


@pytest.mark.parametrize(
    ("template", "vocabulary", "reasoning", "tool_calls"),
    [
        (None, (), None, None),
        ("{{ messages[0].content }}", (), None, None),
        ('… <tool_call>\\n{"name" … </tool_call>', (), None, "hermes"),
        ("… <tool_call>\\n<function=name>\\n<parameter=key> …", (), None, "qwen_xml"),
        ("… <tool_call>name\\n<arg_key>key</arg_key>\\n<arg_value> …", (), None, None),
        ("… <other:tool_call>\\n<function=name>\\n<parameter=key> …", (), None, None),
        ("{{ content.split('</think>')[-1] }}", (), _THINK, None),
        ("{{ '[THINK]' }} {{ '[/THINK]' }}", (), ThinkMarkers("[THINK]", "[/THINK]"), None),
        ("{{ content }}", {"<think>": 5, "</think>": 6}, _THINK, None),
        ("{{ content }}", {"<think>": 5}, None, None),
        ("{{ content }}", {"<tool_call>": 7, "</tool_call>": 8}, None, None),
        (
            "<reasoning></reasoning>",
            {"<think>", "</think>"},
            ThinkMarkers("<reasoning>", "</reasoning>"),
            None,
        ),
    ],
)
def test_a_format_is_detected(template, vocabulary, reasoning, tool_calls):
    found = OutputFormat.detect(template, vocabulary)
    assert found.reasoning == reasoning
    assert found.tool_calls == tool_calls


def test_a_model_reasons_if_its_template_knows_of_it():
    assert OutputFormat.detect("</think>").capabilities == {"tool_call": False, "reasoning": True}
    tokens = {"<think>", "</think>"}
    assert OutputFormat.detect("<tool_call>", tokens).capabilities == {"tool_call": True, "reasoning": False}
