"""Deltas of the engine as OpenAI text completions, streamed and whole."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import msgspec

from helexa.engine.stream import Delta, TokenLogprob
from helexa.engine.tokenizer import Detokenizer, Tokenizer
from helexa.neuron.answers import Answers
from helexa.neuron.pieces import Pieces
from helexa.wire import sse
from helexa.wire.completions import CompletionAnswer, CompletionChoice, CompletionLogprobs
from helexa.wire.generation import FinishReason, Usage, encode


@dataclass
class Echo:
    """What an answer begins with: its prompt, and how likely each token of that is, if this was asked for."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] | None = None


class _Scored(NamedTuple):
    """A token, how likely it was, and where in the choice's text it begins, in characters."""

    token_id: int
    logprob: TokenLogprob | None
    offset: int


class CompletionAnswers(Answers):
    """OpenAI text completions, each with its echo."""

    prefix = "cmpl"

    def __init__(self, model: str, tokenizer: Tokenizer, echoes: list[Echo]):
        super().__init__(model, tokenizer, len(echoes))
        self._echoes = echoes
        self._offsets = [len(echo.text) for echo in echoes]
        self._pieces = [Pieces(tokenizer) for _ in echoes]
        self._texts: list[list[str]] = [[] for _ in echoes]
        self._scored: list[list[_Scored]] = [[] for _ in echoes]
        self._has_logprobs = False
        self._finish_reasons: list[FinishReason | None] = [None] * len(echoes)
        self._stops: list[str | None] = [None] * len(echoes)

    def add(self, index: int, delta: Delta) -> None:
        self._texts[index].append(delta.text)
        if (scored := self._score(index, delta)) is not None:
            self._scored[index] += scored
        self._finish_reasons[index] = cast(FinishReason | None, delta.finish_reason)
        self._stops[index] = delta.stop

    def events(self, index: int, delta: Delta) -> bytes:
        reason = cast(FinishReason | None, delta.finish_reason)
        if reason:
            self._ended.add(index)
        is_first, echo = index not in self._begun, self._echoes[index]
        self._begun.add(index)
        text = echo.text + delta.text if is_first else delta.text
        scored = self._score(index, delta)
        if not text and not scored and not reason:
            return b""
        logprobs = self._wire(scored, echo if is_first else None)
        return self._chunk([CompletionChoice(index, text, logprobs, reason, delta.stop or msgspec.UNSET)])

    def whole(self, usage: Usage) -> bytes:
        choices = [
            CompletionChoice(
                index,
                echo.text + "".join(self._texts[index]),
                self._wire(self._scored[index] if self._has_logprobs else None, echo),
                self._finish_reasons[index],
                self._stops[index] or msgspec.UNSET,
            )
            for index, echo in enumerate(self._echoes)
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

    def _score(self, index: int, delta: Delta) -> list[_Scored] | None:
        """The tokens whose text is complete with `delta`; None where no logprobs were asked for."""
        self._has_logprobs = self._has_logprobs or delta.logprobs is not None
        if not self._has_logprobs:
            return None
        scored = []
        for text, logprob in self._pieces[index].cut(delta):
            if logprob is not None:
                scored.append(_Scored(logprob.token_id, logprob, self._offsets[index]))
            self._offsets[index] += len(text)
        return scored

    def _wire(self, scored: list[_Scored] | None, echo: Echo | None) -> CompletionLogprobs | None:
        """The logprobs of the echo, if it has any, and then of the tokens that were generated."""
        if echo is not None and echo.logprobs is not None:
            scored = [*self._of_echo(echo, echo.logprobs), *(scored or ())]
        if scored is None:
            return None
        tops = [None if item.logprob is None else self._top(item.logprob.top) for item in scored]
        return CompletionLogprobs(
            [self._name(item.token_id) for item in scored],
            [item.logprob.logprob if item.logprob else None for item in scored],
            tops if any(tops) else None,
            [item.offset for item in scored],
        )

    def _top(self, top: Iterable[tuple[int, float]]) -> dict[str, float]:
        """The likeliest tokens by name; of those that look alike, the likelier one."""
        named: dict[str, float] = {}
        for token_id, logprob in top:
            named.setdefault(self._name(token_id), logprob)
        return named

    def _name(self, token_id: int) -> str:
        r"""A token as text, or as `bytes:\xe2\x82`, the way OpenAI writes what is no character by itself."""
        text, data = self._token(token_id)
        if text.encode() == bytes(data):
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _of_echo(self, echo: Echo, logprobs: list[TokenLogprob | None]) -> list[_Scored]:
        """The tokens of the prompt."""
        detokenizer = Detokenizer(self._tokenizer, skip_special=False)
        lengths = [len(detokenizer.push(token_id)) for token_id in echo.token_ids]
        # What the model's file wants before a text has tokens and is no part of the echo.
        offset = min(len(echo.text) - sum(lengths), 0)
        scored = []
        for token_id, logprob, length in zip(echo.token_ids, logprobs, lengths, strict=True):
            scored.append(_Scored(token_id, logprob, max(offset, 0)))
            offset += length
        return scored
