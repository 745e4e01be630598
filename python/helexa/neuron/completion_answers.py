"""Deltas of the engine as OpenAI text completions, streamed and whole."""

from dataclasses import dataclass, field
from typing import cast

import msgspec

from helexa.engine.stream import Delta, TokenLogprob
from helexa.engine.tokenizer import Tokenizer
from helexa.neuron.answers import Answers
from helexa.wire import sse
from helexa.wire.completions import CompletionAnswer, CompletionChoice, CompletionLogprobs
from helexa.wire.generation import FinishReason, Usage, encode


@dataclass
class Echo:
    """What an answer begins with: its prompt, and how likely each token of that is, if this was asked for."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] | None = None


class CompletionAnswers(Answers):
    """OpenAI text completions, each with its echo."""

    prefix = "cmpl"

    def __init__(self, model: str, tokenizer: Tokenizer, echoes: list[Echo]):
        super().__init__(model, tokenizer, len(echoes))
        self._echoes = echoes
        self._offsets = [0] * len(echoes)
        self._texts: list[list[str]] = [[] for _ in echoes]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in echoes]
        self._finish_reasons: list[FinishReason | None] = [None] * len(echoes)
        self._stops: list[str | None] = [None] * len(echoes)

    def add(self, index: int, delta: Delta) -> None:
        self._texts[index].append(delta.text)
        self._logprobs[index] += delta.logprobs or ()
        self._finish_reasons[index] = cast(FinishReason | None, delta.finish_reason)
        self._stops[index] = delta.stop

    def events(self, index: int, delta: Delta) -> bytes:
        reason = cast(FinishReason | None, delta.finish_reason)
        if reason:
            self._ended.add(index)
        is_first, echo = index not in self._begun, self._echoes[index]
        self._begun.add(index)
        text = echo.text + delta.text if is_first else delta.text
        if not text and not delta.logprobs and not reason:
            return b""
        logprobs = self._wire(index, delta.logprobs, echo if is_first else None)
        return self._chunk([CompletionChoice(index, text, logprobs, reason, delta.stop or msgspec.UNSET)])

    def whole(self, usage: Usage) -> bytes:
        choices = [
            CompletionChoice(
                index,
                echo.text + "".join(self._texts[index]),
                self._wire(index, self._logprobs[index] or None, echo),
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

    def _wire(
        self, index: int, logprobs: list[TokenLogprob] | None, echo: Echo | None
    ) -> CompletionLogprobs | None:
        """The logprobs of the echo, if it has any, and then of the tokens that were generated."""
        items: list[tuple[int, TokenLogprob | None]] = []
        if echo and echo.logprobs is not None:
            items += zip(echo.token_ids, echo.logprobs, strict=True)
        items += [(item.token_id, item) for item in logprobs or ()]
        if not items and logprobs is None:
            return None
        tokens = [self._token(token_id)[0] for token_id, _ in items]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        tops = [
            None if item is None else {self._token(token_id)[0]: logprob for token_id, logprob in item.top}
            for _, item in items
        ]
        return CompletionLogprobs(
            tokens,
            [item.logprob if item else None for _, item in items],
            tops if any(tops) else None,
            offsets,
        )
