"""Deltas of the engine as answers of the wire: a class for each dialect, for streams and whole answers."""

import time
import uuid
from abc import ABC, abstractmethod
from typing import cast

import msgspec

from helexa.engine.stream import Delta, TokenLogprob
from helexa.engine.tokenizer import Tokenizer
from helexa.errors import HelexaError
from helexa.wire import sse
from helexa.wire.chat import (
    AnswerMessage,
    ChatAnswer,
    ChatChunk,
    ChatDelta,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    TopLogprob,
)
from helexa.wire.chat import TokenLogprob as WireLogprob
from helexa.wire.completions import CompletionAnswer, CompletionChoice, CompletionLogprobs
from helexa.wire.errors import error_body
from helexa.wire.generation import FinishReason, Usage, encode


class Answers(ABC):
    """The answer to one request: `events`, `end` and `failure` make up a stream, `add` and `whole` a body."""

    prefix: str

    def __init__(self, model: str, tokenizer: Tokenizer, num_choices: int):
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._tokenizer = tokenizer
        self._texts: list[list[str]] = [[] for _ in range(num_choices)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(num_choices)]
        self._finish_reasons: list[FinishReason | None] = [None] * num_choices
        self._stops: list[str | None] = [None] * num_choices
        self._begun: set[int] = set()

    def add(self, index: int, delta: Delta) -> None:
        """Keeps a delta for `whole`."""
        self._texts[index].append(delta.text)
        self._logprobs[index] += delta.logprobs or ()
        if delta.finish_reason:
            self._finish_reasons[index] = cast(FinishReason, delta.finish_reason)
            self._stops[index] = delta.stop

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
        finishes = [
            self._finish(index) for index, reason in enumerate(self._finish_reasons) if reason is None
        ]
        return sse.encode(error_body(error)) + b"".join(finishes) + sse.DONE

    @abstractmethod
    def _chunk(self, choices: list[msgspec.Struct], usage: Usage | None = None) -> bytes: ...

    @abstractmethod
    def _finish(self, index: int) -> bytes: ...

    def _token(self, token_id: int) -> tuple[str, list[int]]:
        """A token as text, with U+FFFD for what is no character by itself, and as bytes."""
        data = self._tokenizer.token_bytes(token_id)
        return data.decode("utf-8", "replace"), list(data)


class ChatAnswers(Answers):
    """OpenAI chat completions."""

    prefix = "chatcmpl"

    def events(self, index: int, delta: Delta) -> bytes:
        found = b""
        if index not in self._begun:
            self._begun.add(index)
            found = self._chunk([ChunkChoice(index, ChatDelta(role="assistant", content=""))])
        if delta.text or delta.logprobs:
            found += self._chunk(
                [ChunkChoice(index, ChatDelta(content=delta.text), self._wire(delta.logprobs))]
            )
        if delta.finish_reason:
            self._finish_reasons[index] = cast(FinishReason, delta.finish_reason)
            reason, stop = self._finish_reasons[index], delta.stop or msgspec.UNSET
            found += self._chunk([ChunkChoice(index, ChatDelta(), None, reason, stop)])
        return found

    def whole(self, usage: Usage) -> bytes:
        choices = [
            Choice(
                index,
                AnswerMessage("".join(texts)),
                reason,
                self._wire(logprobs or None),
                stop or msgspec.UNSET,
            )
            for index, (texts, logprobs, reason, stop) in enumerate(
                zip(self._texts, self._logprobs, self._finish_reasons, self._stops, strict=True)
            )
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


class CompletionAnswers(Answers):
    """OpenAI text completions; `echoes` are texts to begin the choices with."""

    prefix = "cmpl"

    def __init__(self, model: str, tokenizer: Tokenizer, num_choices: int, echoes: list[str] | None = None):
        super().__init__(model, tokenizer, num_choices)
        self._echoes = echoes or [""] * num_choices
        self._offsets = [0] * num_choices

    def events(self, index: int, delta: Delta) -> bytes:
        text = delta.text
        if index not in self._begun:
            self._begun.add(index)
            text = self._echoes[index] + text
        if not text and not delta.logprobs and not delta.finish_reason:
            return b""
        reason = cast(FinishReason | None, delta.finish_reason)
        self._finish_reasons[index] = reason
        return self._chunk([CompletionChoice(index, text, self._wire(index, delta.logprobs), reason)])

    def whole(self, usage: Usage) -> bytes:
        choices = [
            CompletionChoice(
                index,
                self._echoes[index] + "".join(texts),
                self._wire(index, self._logprobs[index] or None),
                self._finish_reasons[index],
            )
            for index, texts in enumerate(self._texts)
        ]
        return encode(self._answer(choices, usage))

    def _chunk(self, choices: list[msgspec.Struct], usage: Usage | None = None) -> bytes:
        return sse.encode_raw(encode(self._answer(cast(list[CompletionChoice], choices), usage)))

    def _answer(self, choices: list[CompletionChoice], usage: Usage | None) -> CompletionAnswer:
        return CompletionAnswer(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )

    def _finish(self, index: int) -> bytes:
        return self._chunk([CompletionChoice(index, "", None, "error")])

    def _wire(self, index: int, logprobs: list[TokenLogprob] | None) -> CompletionLogprobs | None:
        if logprobs is None:
            return None
        tokens = [self._token(item.token_id)[0] for item in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        tops = [{self._token(token_id)[0]: logprob for token_id, logprob in item.top} for item in logprobs]
        return CompletionLogprobs(
            tokens, [item.logprob for item in logprobs], tops if any(tops) else None, offsets
        )
