"""docs/configuration.md has exactly the keys that the daemons read, with their defaults."""

import dataclasses
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helexa.gateway.catalogue import _CatalogueFile
from helexa.gateway.config import GatewayConfig
from helexa.neuron.config import NeuronConfig

DOCUMENT = Path(__file__).parents[1] / "docs" / "configuration.md"
FILES = {"gateway.toml": GatewayConfig, "models.toml": _CatalogueFile, "neuron.toml": NeuronConfig}


def keys(schema: Any, table: str = "") -> Iterator[tuple[str, str]]:
    """Every key as it is documented, `[section] key` or `[[sections]] key`, with its default."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        inner = [item for item in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(item)]
        is_list = typing.get_origin(kind) in (tuple, list)
        if inner and (is_list or not table):
            yield from keys(inner[0], f"[[{field.name}]] " if is_list else f"[{field.name}] ")
        elif inner:
            for name, default in keys(inner[0], table):
                yield name.replace(table, f"{table}{field.name}.", 1), default
        else:
            yield f"{table}{field.name}", shown(field)


def shown(field: "dataclasses.Field[Any]") -> str:
    """The default as TOML writes it; a dash for none."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return "-"
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def documented(name: str) -> dict[str, str]:
    """Key and default of each row in the section of the file."""
    sections = re.split(r"^## ", DOCUMENT.read_text("utf-8"), flags=re.MULTILINE)
    section = next(text for text in sections if text.startswith(f"`{name}`"))
    rows = re.findall(r"^\| `([^`]+)` \| `?([^|`]+?)`? \|", section, re.MULTILINE)
    return dict(rows)


@pytest.mark.parametrize("name", FILES)
def test_every_key_has_a_row_with_its_default_and_no_row_is_left_over(name: str) -> None:
    expected = dict(keys(FILES[name]))
    # A model of the neuron may set every key of [engine] for itself; the document says so once.
    repeated = {key for key in expected if key.replace("[[models]]", "[engine]") in expected.keys() - {key}}
    assert documented(name) == {key: default for key, default in expected.items() if key not in repeated}
