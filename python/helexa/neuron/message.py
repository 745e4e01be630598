"""The message of one choice, read from a model's text while it comes: reasoning, content, tool calls."""

import uuid
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import msgspec

from helexa.engine.engine import Engine
from helexa.engine.output import Content, Event, OutputFormat, OutputParser, Reasoning, ToolStart
from helexa.engine.stream import Delta, TokenLogprob
from helexa.engine.tokenizer import Tokenizer
from helexa.neuron.pieces import Piece, Pieces
from helexa.neuron.prompt import require_tokenizer
from helexa.wire.chat import (
    AnswerMessage,
    ChatDelta,
    ChatRequest,
    FunctionCall,
    FunctionCallDelta,
    ToolCall,
    ToolCallDelta,
)
from helexa.wire.generation import FinishReason


@dataclass(frozen=True, slots=True)
class Part:
    """What goes into one event of a stream."""

    delta: ChatDelta
    logprobs: list[TokenLogprob] | None = None


class _Places:
    """Finds the tokens of a piece of content in the text that was parsed, markers and reasoning included."""

    def __init__(self) -> None:
        self._text = ""
        # Lengths of texts, and what is not given out yet.
        self._tokens: deque[tuple[int, TokenLogprob | None]] = deque()

    def add(self, piece: Piece) -> None:
        self._text += piece.text
        self._tokens.append((len(piece.text), piece.logprob))

    def take(self, text: str) -> list[TokenLogprob]:
        """The tokens that `text`, the newest that the parser has decided on, has a part of."""
        start = 0 if self._text.startswith(text) else max(self._text.rfind(text), 0)
        self._advance(start)
        return self._advance(len(text))

    def _advance(self, length: int) -> list[TokenLogprob]:
        self._text = self._text[length:]
        passed = []
        while length and self._tokens:
            size, logprob = self._tokens.popleft()
            if logprob is not None:
                passed.append(logprob)
            if size > length:  # the rest of this token has been given out with its beginning
                self._tokens.appendleft((size - length, None))
            length = max(length - size, 0)
        return passed


class MessageReader:
    """Takes the deltas of one choice. Without a parser all text is content."""

    def __init__(
        self, tokenizer: Tokenizer, parser: OutputParser | None = None, *, max_calls: int | None = None
    ):
        self.finish_reason: FinishReason | None = None
        self.stop: str | None = None
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None  # of the content, if they were asked for
        self._parser = parser
        self._max_calls = max_calls
        self._has_dropped = False
        self._ends_in_reasoning = False
        self._pieces = Pieces(tokenizer)
        self._places = _Places()
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[tuple[str, str, list[str]]] = []  # id, name, pieces of arguments

    def feed(self, delta: Delta) -> list[Part]:
        """What the delta adds to the message."""
        self.token_ids += delta.token_ids
        if delta.logprobs is not None and self.logprobs is None:
            self.logprobs = []
        if self.logprobs is None:
            parts = self._parts(self._events(delta.text))
        else:  # token by token, so that those of content can be told from others
            parts = []
            for piece in self._pieces.cut(delta):
                self._places.add(piece)
                parts += self._parts(self._events(piece.text))
        if delta.finish_reason:
            parts += self._parts(self._last_events(delta))
            is_call = self._calls and delta.finish_reason == "stop" and delta.stop is None
            self.finish_reason = cast(FinishReason, "tool_calls" if is_call else delta.finish_reason)
            self.stop = delta.stop
        return _merged(parts)

    def message(self) -> AnswerMessage:
        """The message so far."""
        content = "".join(self._content)
        calls = [
            ToolCall(FunctionCall(name, "".join(pieces)), call_id) for call_id, name, pieces in self._calls
        ]
        return AnswerMessage(
            content=content or (None if calls else ""),
            reasoning_content="".join(self._reasoning) or None,
            tool_calls=calls or None,
        )

    @property
    def is_in_reasoning(self) -> bool:
        return self._parser is not None and self._parser.is_in_reasoning

    @property
    def is_faithful(self) -> bool:
        """Whether the message says all that was generated, so that the tokens may stand for it later."""
        if self.finish_reason == "length":
            return not self._calls and not self._ends_in_reasoning
        return self.finish_reason is not None and self.stop is None and not self._has_dropped

    def _events(self, text: str) -> list[Event]:
        if self._parser is None:
            return [Content(text)] if text else []
        return self._parser.push(text)

    def _last_events(self, delta: Delta) -> list[Event]:
        if self._parser is None:
            return []
        self._ends_in_reasoning = self._parser.is_in_reasoning
        return self._parser.flush(truncated=delta.finish_reason == "length" or delta.stop is not None)

    def _parts(self, events: Iterable[Event]) -> list[Part]:
        return [part for event in events for part in self._part(event)]

    def _part(self, event: Event) -> list[Part]:
        if isinstance(event, Reasoning):
            self._reasoning.append(event.text)
            self._places.take(event.text)
            return [Part(ChatDelta(reasoning_content=event.text))]
        if isinstance(event, Content):
            self._content.append(event.text)
            if self.logprobs is None:
                return [Part(ChatDelta(content=event.text))]
            taken = self._places.take(event.text)
            self.logprobs += taken
            return [Part(ChatDelta(content=event.text), taken)]
        if self._max_calls is not None and event.index >= self._max_calls:
            self._has_dropped = True
            return []
        if isinstance(event, ToolStart):
            call_id = f"call_{uuid.uuid4().hex[:24]}"
            self._calls.append((call_id, event.name, []))
            begun = ToolCallDelta(event.index, call_id, "function", FunctionCallDelta(event.name, ""))
            return [Part(ChatDelta(tool_calls=[begun]))]
        self._calls[event.index][2].append(event.fragment)
        more = ToolCallDelta(event.index, function=FunctionCallDelta(arguments=event.fragment))
        return [Part(ChatDelta(tool_calls=[more]))]


def message_reader(engine: Engine, request: ChatRequest, prompt_tail: str) -> MessageReader:
    """A reader for one choice of the request, whose prompt ends in `prompt_tail`."""
    tokenizer = require_tokenizer(engine, "messages")
    if engine.output_format == OutputFormat():
        return MessageReader(tokenizer)
    tools = [msgspec.to_builtins(tool) for tool in request.offered_tools]
    parser = engine.output_format.parser(tools=tools, prompt_tail=prompt_tail, parse_tools=bool(tools))
    return MessageReader(tokenizer, parser, max_calls=1 if request.parallel_tool_calls is False else None)


def _merged(parts: list[Part]) -> list[Part]:
    """The same with neighbours of one kind as one."""
    merged: list[Part] = []
    for part in parts:
        joined = _join(merged[-1], part) if merged else None
        if joined is None:
            merged.append(part)
        else:
            merged[-1] = joined
    return merged


def _join(left: Part, right: Part) -> Part | None:
    one, two = left.delta, right.delta
    if one.reasoning_content is not None and two.reasoning_content is not None:
        return Part(ChatDelta(reasoning_content=one.reasoning_content + two.reasoning_content))
    if one.content is not None and two.content is not None:
        logprobs = None if left.logprobs is None else left.logprobs + (right.logprobs or [])
        return Part(ChatDelta(content=one.content + two.content), logprobs)
    return None
