"""The JSON types that schemas admit."""

import pytest

from helexa.engine.output.json_types import ANY, as_declared, declared_types

_ROOT = {"$defs": {"n": {"type": "integer"}, "again": {"$ref": "#/$defs/again"}, "a/b": {"type": "null"}}}


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"type": "string", "nullable": True}, {"string", "null"}),
        ({"enum": ["a", 1, None, 1.5]}, {"string", "integer", "null", "number"}),
        ({"const": True}, {"boolean"}),
        ({"anyOf": [{"type": "string"}, {"$ref": "#/$defs/n"}]}, {"string", "integer"}),
        ({"oneOf": [{"items": {}}, {"properties": {}}]}, {"array", "object"}),
        ({"allOf": [{"$ref": "#/$defs/n"}, {"minimum": 3}]}, {"integer"}),
        ({"$ref": "#/$defs/a~1b"}, {"null"}),
        ({"$ref": "#/$defs/again"}, ANY),
        ({"$ref": "#/nowhere"}, ANY),
        ({"$ref": "https://example.com/x"}, ANY),
        ({"type": "mystery"}, ANY),
        ({"description": "anything"}, ANY),
        (True, ANY),
        ("nonsense", ANY),
    ],
)
def test_the_types_of_a_schema(schema, types):
    assert declared_types(schema, _ROOT) == types


@pytest.mark.parametrize(
    ("value", "types", "expected"),
    [
        ("5", {"number"}, "5"),
        ("5.0", {"integer"}, "5"),
        ("5.5", {"integer"}, "5.5"),
        ('"5"', {"integer"}, "5"),
        ('"5"', {"integer", "string"}, '"5"'),
        ('"five"', {"integer"}, '"five"'),
        ("5", {"string"}, '"5"'),
        ('{"a": 1}', {"string"}, '"{\\"a\\": 1}"'),
        ("null", {"string"}, "null"),
        ('"[1]"', {"array"}, "[1]"),
        ('"True"', {"boolean"}, "true"),
    ],
)
def test_a_value_is_converted_where_that_loses_nothing(value, types, expected):
    assert as_declared(value, frozenset(types)) == expected
