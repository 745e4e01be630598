"""The text that a model writes, as reasoning, answer and tool calls: which format it has, parsing, grammars. No torch."""

from helexa.engine.output.events import Content, Event, Reasoning, ToolArguments, ToolStart
from helexa.engine.output.format import OutputFormat
from helexa.engine.output.parser import OutputParser, ThinkMarkers

__all__ = [
    "Content",
    "Event",
    "OutputFormat",
    "OutputParser",
    "Reasoning",
    "ThinkMarkers",
    "ToolArguments",
    "ToolStart",
]
