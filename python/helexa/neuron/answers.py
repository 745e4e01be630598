"""Deltas of the engine as answers of the wire, for streams and whole answers: what all share, and chat."""

import time
import uuid
from abc import ABC, abstractmethod
from typing import cast

import msgspec

from helexa.engine.stream import Delta, TokenLogprob
from helexa.engine.tokenizer import Tokenizer
from helexa.errors import HelexaError
from helexa.neuron.message import MessageReader
from helexa.wire import sse
from helexa.wire.chat import (
    ChatAnswer,
    ChatChunk,
    ChatDelta,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    TopLogprob,
)
from helexa.wire.chat import TokenLogprob as WireLogprob
from helexa.wire.errors import error_body
from helexa.wire.generation import Usage, encode


class Answers(ABC):
    """The answer to one request: `events`, `end` and `failure` make up a stream, `add` and `whole` a body."""

    prefix: str

    def __init__(self, model: str, tokenizer: Tokenizer, num_choices: int):
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._tokenizer = tokenizer
        self._num_choices = num_choices
        self._begun: set[int] = set()
        self._ended: set[int] = set()

    @abstractmethod
    def add(self, index: int, delta: Delta) -> None:
        """Keeps a delta for `whole`."""

    @abstractmethod
    def events(self, index: int, delta: Delta) -> bytes:
        """What a delta adds to the stream; empty if a client would learn nothing from it."""

    @abstractmethod
    def whole(self, usage: Usage) -> bytes:
        """The answer made of all deltas that were added."""

    def end(self, usage: Usage | None) -> bytes:
        """The end of a stream that went well, with a usage event if there is a usage."""
        return (self._chunk([], usage) if usage else b"") + sse.DONE

    def failure(self, error: HelexaError) -> bytes:
        """The end of one that did not: an error event, and a finish for clients that do not know those."""
        finishes = [self._finish(index) for index in range(self._num_choices) if index not in self._ended]
        return sse.encode(error_body(error)) + b"".join(finishes) + sse.DONE

    @abstractmethod
    def _chunk(self, choices: list[msgspec.Struct], usage: Usage | None = None) -> bytes: ...

    @abstractmethod
    def _finish(self, index: int) -> bytes: ...

    def _token(self, token_id: int) -> tuple[str, list[int]]:
        """A token as text, with U+FFFD for what is no character by itself, and as bytes."""
        # Models may have more tokens than their vocabulary; the surplus has no text.
        is_text = token_id < self._tokenizer.vocab_size
        data = self._tokenizer.token_bytes(token_id) if is_text else b""
        return data.decode("utf-8", "replace"), list(data)


class ChatAnswers(Answers):
    """OpenAI chat completions; `readers`, one for each choice, take the model's text apart."""

    prefix = "chatcmpl"

    def __init__(self, model: str, tokenizer: Tokenizer, readers: list[MessageReader]):
        super().__init__(model, tokenizer, len(readers))
        self.readers = readers

    def add(self, index: int, delta: Delta) -> None:
        self.readers[index].feed(delta)

    def events(self, index: int, delta: Delta) -> bytes:
        reader = self.readers[index]
        choices = []
        if index not in self._begun:
            self._begun.add(index)
            choices.append(ChunkChoice(index, ChatDelta(role="assistant", content="")))
        choices += [ChunkChoice(index, part.delta, self._wire(part.logprobs)) for part in reader.feed(delta)]
        if delta.finish_reason:
            self._ended.add(index)
            stop = reader.stop or msgspec.UNSET
            choices.append(ChunkChoice(index, ChatDelta(), None, reader.finish_reason, stop))
        return b"".join(self._chunk([choice]) for choice in choices)

    def whole(self, usage: Usage) -> bytes:
        choices = [
            Choice(
                index,
                reader.message(),
                reader.finish_reason,
                self._wire(reader.logprobs),
                reader.stop or msgspec.UNSET,
            )
            for index, reader in enumerate(self.readers)
        ]
        return encode(
            ChatAnswer(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)
        )

    def _chunk(self, choices: list[msgspec.Struct], usage: Usage | None = None) -> bytes:
        chunk = ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=cast(list[ChunkChoice], choices),
            usage=usage,
        )
        return sse.encode_raw(encode(chunk))

    def _finish(self, index: int) -> bytes:
        return self._chunk([ChunkChoice(index, ChatDelta(), None, "error")])

    def _wire(self, logprobs: list[TokenLogprob] | None) -> ChoiceLogprobs | None:
        if logprobs is None:
            return None
        return ChoiceLogprobs(
            [
                WireLogprob(
                    *self._with_logprob(item.token_id, item.logprob),
                    top_logprobs=[TopLogprob(*self._with_logprob(*pair)) for pair in item.top],
                )
                for item in logprobs
            ]
        )

    def _with_logprob(self, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
        text, data = self._token(token_id)
        return text, logprob, data
