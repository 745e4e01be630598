"""What a model writes, taken apart into reasoning, answer and calls; grammars that have it call tools."""

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
