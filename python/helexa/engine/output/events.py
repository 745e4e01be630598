"""What a model's text turns out to be, piece by piece."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolStart:
    """A call begins; its arguments follow as ToolArguments with the same index."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolArguments:
    """A piece of one call's arguments; all pieces together are one JSON object if the call was complete."""

    index: int
    fragment: str


Event = Reasoning | Content | ToolStart | ToolArguments


def joined(events: "list[Event]", event: Event) -> None:
    """Appends `event`, or lengthens the last one if it goes on there."""
    last = events[-1] if events else None
    if isinstance(event, Content) and isinstance(last, Content):
        events[-1] = Content(last.text + event.text)
    elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
        events[-1] = Reasoning(last.text + event.text)
    elif isinstance(event, ToolArguments) and isinstance(last, ToolArguments) and last.index == event.index:
        events[-1] = ToolArguments(event.index, last.fragment + event.fragment)
    else:
        events.append(event)
