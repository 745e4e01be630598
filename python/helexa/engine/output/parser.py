"""A model's text, taken apart into reasoning, answer and tool calls while it arrives.

Whatever is not a block or a call of the model's format comes out as it came, byte for byte. Only the
whitespace between a block or a call and its neighbours belongs to the format, and is dropped. How the text
is cut into pieces makes no difference to what comes out, only to when.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from helexa.engine.output.calls import Calls
from helexa.engine.output.events import Content, Event, Reasoning, ToolStart, joined
from helexa.engine.output.source import WHITESPACE, Read, Source
from helexa.engine.output.tags import FENCE, OPEN
from helexa.engine.output.tools import Tools

_MAX_FAILURES = 16  # text full of broken calls must not be read again from each of them


@dataclass(frozen=True, slots=True)
class ThinkMarkers:
    """What begins and ends a block of reasoning."""

    start: str
    end: str


class OutputParser:
    """Takes one answer apart. `push` its pieces, then `flush` once."""

    def __init__(
        self,
        markers: ThinkMarkers | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        is_in_reasoning: bool = False,
    ):
        """tools: what may be called; without any, calls are text.   is_in_reasoning: the prompt ends so."""
        self.is_in_reasoning = is_in_reasoning
        self._markers = markers
        self._source = Source()
        self._tools = Tools(tools)
        self._calls = Calls(self._source, self._tools, self._emit)
        self._events: list[Event] = []
        self._tentative: list[Event] | None = None  # what has been read that may have to be read otherwise
        self._failures = 0
        self._has_thought = False
        self._num_quoted = 0  # beginnings of reasoning that are text and have no end yet
        self._separator = ""  # between the text before a block and the text behind it
        self._reader = self._answer()

    @property
    def num_calls(self) -> int:
        """How many calls have begun."""
        return self._calls.count

    def push(self, text: str) -> list[Event]:
        """What is certain now that `text` has arrived."""
        self._source.append(text)
        return self._read()

    def flush(self, *, truncated: bool = False) -> list[Event]:
        """What was held back. truncated: a limit cut the text off, so an open call stays incomplete."""
        self._source.ended = True
        self._source.truncated = truncated
        return self._read()

    def _read(self) -> list[Event]:
        next(self._reader, None)
        events, self._events = self._events, []
        return events

    def _emit(self, event: Event) -> None:
        if self._tentative is not None:
            joined(self._tentative, event)
            return
        if isinstance(event, ToolStart):
            self._source.release()
        joined(self._events, event)

    # The answer as a whole

    def _answer(self) -> Read[None]:
        """Blocks of reasoning and calls, and between them text."""
        if self._markers is not None and self.is_in_reasoning:
            yield from self._reasoning(self._markers)
            is_after_block = True
        else:
            is_after_block = False
        while (yield from self._text(is_after_block)):
            is_after_block = True

    def _text(self, is_after_block: bool) -> Read[bool]:
        """Reads text, and the block or the call behind it; False at the end of the answer."""
        source = self._source
        stops = _run_of_text({"<", self._markers.start[0], self._markers.end[0]} if self._markers else {"<"})
        is_fresh = True  # nothing but whitespace so far
        while True:
            gap = yield from self._gap()
            if not (yield from source.char(len(gap))):
                if not (is_after_block and is_fresh):
                    self._write(source.take(len(gap)))
                return False
            is_line_start = is_fresh or "\n" in gap
            if (yield from self._is_block(len(gap), is_fresh, is_line_start)):
                if not is_fresh:
                    self._separator = gap or "\n"
                return True
            source.take(len(gap))
            self._write(self._separator if is_after_block and is_fresh else gap)
            is_fresh = False
            self._write(source.take_run(stops) or source.take(1))

    def _is_block(self, gap: int, is_fresh: bool, is_line_start: bool) -> Read[bool]:
        """Reads the reasoning or the calls behind `gap`; False, with nothing read, if there are none."""
        markers, source = self._markers, self._source
        if markers is not None:
            if (yield from source.starts_with(markers.start, gap)):
                if is_fresh:
                    source.take(gap + len(markers.start))
                    yield from self._reasoning(markers)
                    return True
                self._num_quoted += 1
            if (yield from self._is_stray_end(markers, gap, is_line_start)):
                return True
        return self._may_call and (yield from self._is_call(gap, is_fresh, is_line_start))

    def _is_stray_end(self, markers: ThinkMarkers, gap: int, is_line_start: bool) -> Read[bool]:
        """Goes past an end of reasoning that nothing began, if it stands on a line of its own."""
        source = self._source
        if not (yield from source.starts_with(markers.end, gap)):
            return False
        if self._num_quoted:
            self._num_quoted -= 1
            return False
        length = gap + len(markers.end)
        if not is_line_start or (yield from source.char(length)) not in ("", "\n", "\r"):
            return False
        source.take(length)
        return True

    # Calls

    @property
    def _may_call(self) -> bool:
        return self._tools.longest_name > 0 and self._failures < _MAX_FAILURES

    def _is_call(self, gap: int, is_fresh: bool, is_line_start: bool) -> Read[bool]:
        source, calls = self._source, self._calls
        is_wrapped = yield from source.starts_with(OPEN, gap)
        if is_wrapped or (yield from self._is_bare_call(gap, is_fresh, is_line_start)):
            mark = source.mark()
            source.take(gap)
            if (yield from (calls.wrapped() if is_wrapped else calls.bare())):
                return True
            source.rewind(mark)
            self._failures += 1
            return False
        if is_line_start and not is_fresh and not (yield from source.starts_with(FENCE, gap)):
            return (yield from calls.is_bare_object(gap)) and (yield from self._is_closed_object(gap))
        return False

    def _is_bare_call(self, gap: int, is_fresh: bool, is_line_start: bool) -> Read[bool]:
        if is_line_start and (yield from self._calls.is_bare_function(gap)):
            return True
        return is_fresh and (yield from self._calls.is_bare_object(gap))

    def _is_closed_object(self, gap: int) -> Read[bool]:
        """Reads an object behind text as a call if `</tool_call>` follows it; else it is an example."""
        count, mark = self._begin_tentative()
        self._source.take(gap)
        is_closed = yield from self._calls.bare(must_close=True)
        self._end_tentative(count, mark, keep=is_closed)
        return is_closed

    def _begin_tentative(self) -> tuple[int, int]:
        """From here on, events wait for `_end_tentative`, and the text can be read again."""
        self._tentative = []
        return self._calls.count, self._source.mark()

    def _end_tentative(self, count: int, mark: int, *, keep: bool) -> None:
        """Lets the events go, or forgets them and goes back."""
        events, self._tentative = self._tentative or [], None
        if keep:
            self._source.release(mark)
            self._events += events
        else:
            self._source.rewind(mark)
            self._calls.count = count
            self._failures += 1

    # Reasoning

    def _reasoning(self, markers: ThinkMarkers) -> Read[None]:
        """Reads a block of reasoning and past its end."""
        source = self._source
        self.is_in_reasoning = True
        stops = _run_of_text({"<", markers.end[0]})
        yield from source.skip_whitespace()
        if (yield from source.starts_with(markers.start)):  # once in the prompt and once by the model
            source.take(len(markers.start))
            yield from source.skip_whitespace()
        is_fresh = True
        while True:
            gap = yield from self._gap()
            if (yield from source.starts_with(markers.end, len(gap))):
                source.take(len(gap) + len(markers.end))
                break
            if (is_fresh or "\n" in gap) and (yield from self._is_call_instead(markers, len(gap))):
                break
            character = yield from source.char(len(gap))
            if is_fresh and self._has_thought and character:
                self._think("\n")  # between two blocks
            self._think(source.take(len(gap)))
            if not character:
                break
            self._think(source.take_run(stops) or source.take(1))
            is_fresh, self._has_thought = False, True
        self.is_in_reasoning = False

    def _is_call_instead(self, markers: ThinkMarkers, gap: int) -> Read[bool]:
        """Reads calls made without an end of the reasoning: nothing but that end may follow them."""
        source, calls = self._source, self._calls
        if not self._may_call:
            return False
        is_wrapped = yield from source.starts_with(OPEN, gap)
        if not is_wrapped and not (yield from calls.is_bare_function(gap)):
            return False
        count, mark = self._begin_tentative()
        source.take(gap)
        is_call = yield from (calls.wrapped() if is_wrapped else calls.bare())
        yield from source.skip_whitespace()
        while is_call and (yield from source.starts_with(OPEN)):
            is_call = yield from calls.wrapped()
            yield from source.skip_whitespace()
        if is_call and (yield from source.starts_with(markers.end)):
            source.take(len(markers.end))
            yield from source.skip_whitespace()
        is_call = is_call and not source.truncated and not (yield from source.char())
        # What seemed to be one call may have gone on through the end of the reasoning and into the answer.
        is_call = is_call and markers.end not in source.since(mark).rstrip().removesuffix(markers.end)
        self._end_tentative(count, mark, keep=is_call)
        return is_call

    # Small things

    def _gap(self) -> Read[str]:
        """The whitespace that stands here."""
        gap = ""
        while (character := (yield from self._source.char(len(gap)))) and character in WHITESPACE:
            gap += character
        return gap

    def _write(self, text: str) -> None:
        if text:
            self._emit(Content(text))

    def _think(self, text: str) -> None:
        if text:
            self._emit(Reasoning(text))


def _run_of_text(stops: set[str]) -> re.Pattern[str]:
    """Words up to a line break or a character that might begin a tag."""
    word = "[^ \\t\\r\\n" + "".join(map(re.escape, sorted(stops))) + "]+"
    return re.compile(f"{word}(?:[ \\t]+{word})*")
