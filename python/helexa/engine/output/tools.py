"""The tools of a request: their names, even misspelt, and what their schemas say of arguments."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from helexa.engine.output.json_types import JsonTypes, declared_types


class Tool:
    """One function that the model may call."""

    def __init__(self, name: str, parameters: Mapping[str, Any] | None):
        self.name = name
        self.parameters: Mapping[str, Any] = parameters or {}
        properties = self.parameters.get("properties")
        self.properties: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        self._types: dict[str, JsonTypes] = {}

    @property
    def required(self) -> list[str]:
        required = self.parameters.get("required")
        return [name for name in required if isinstance(name, str)] if isinstance(required, list) else []

    def types(self, key: str) -> JsonTypes | None:
        """The types that the argument `key` may have; None if the schema says nothing of it."""
        if key not in self._types:
            schema = self.properties.get(key, self.parameters.get("additionalProperties"))
            if schema is None or isinstance(schema, bool):
                return None
            self._types[key] = declared_types(schema, self.parameters)
        return self._types[key]


class Tools:
    """The tools of a request by name."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]):
        """tools: as in OpenAI's chat API; those that are no functions are left out."""
        functions = [tool.get("function") for tool in tools]
        self._tools = {
            function["name"]: Tool(function["name"], function.get("parameters"))
            for function in functions
            if isinstance(function, Mapping) and isinstance(function.get("name"), str)
        }
        self._by_plain_name: dict[str, str | None] = {}
        for name in self._tools:
            plain = _plain(name)
            self._by_plain_name[plain] = None if plain in self._by_plain_name else name
        self.longest_name = max(map(len, self._tools), default=0)

    def __contains__(self, name: str) -> bool:
        return name in self._tools

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools.values())

    def find(self, written: str) -> Tool:
        """The tool that a model means by `written`; one without a schema if there is none."""
        name = written.strip().strip("\"'`").strip()
        found = name if name in self._tools else self._by_plain_name.get(_plain(name))
        return self._tools[found] if found else Tool(name, None)

    def accepting(self, keys: Sequence[str]) -> Tool | None:
        """The only tool whose schema has all of `keys`, and whose required ones are among them."""
        fitting = [
            tool
            for tool in self._tools.values()
            if keys and set(keys) <= set(tool.properties) and set(tool.required) <= set(keys)
        ]
        return fitting[0] if len(fitting) == 1 else None


def _plain(name: str) -> str:
    """A name without what models get wrong: case, separators, and a prefix for its kind."""
    return name.rpartition("functions.")[2].replace("-", "_").replace(".", "_").casefold()
