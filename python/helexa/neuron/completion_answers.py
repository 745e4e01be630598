"""Deltas of the engine as OpenAI text completions, streamed and whole."""

from typing import cast

import msgspec

from helexa.engine.stream import Delta, TokenLogprob
from helexa.engine.tokenizer import Tokenizer
from helexa.neuron.answers import Answers
from helexa.wire import sse
from helexa.wire.completions import CompletionAnswer, CompletionChoice, CompletionLogprobs
from helexa.wire.generation import FinishReason, Usage, encode


class CompletionAnswers(Answers):
    """OpenAI text completions; `echoes` are texts to begin the choices with."""

    prefix = "cmpl"

    def __init__(self, model: str, tokenizer: Tokenizer, echoes: list[str]):
        super().__init__(model, tokenizer, len(echoes))
        self._echoes = echoes
        self._offsets = [0] * len(echoes)
        self._texts: list[list[str]] = [[] for _ in echoes]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in echoes]
        self._finish_reasons: list[FinishReason | None] = [None] * len(echoes)

    def add(self, index: int, delta: Delta) -> None:
        self._texts[index].append(delta.text)
        self._logprobs[index] += delta.logprobs or ()
        self._finish_reasons[index] = cast(FinishReason | None, delta.finish_reason)

    def events(self, index: int, delta: Delta) -> bytes:
        text = delta.text
        if index not in self._begun:
            self._begun.add(index)
            text = self._echoes[index] + text
        if not text and not delta.logprobs and not delta.finish_reason:
            return b""
        reason = cast(FinishReason | None, delta.finish_reason)
        if reason:
            self._ended.add(index)
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
