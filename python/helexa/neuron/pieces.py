"""Which part of an answer's text came from which token."""

from collections import deque
from collections.abc import Iterator
from itertools import zip_longest
from typing import NamedTuple

from helexa.engine.stream import Delta, TokenLogprob
from helexa.engine.tokenizer import Detokenizer, Tokenizer


class Piece(NamedTuple):
    """The text of a token, or at the end what is left of several."""

    text: str
    logprob: TokenLogprob | None


class Pieces:
    """Cuts the text of deltas, which may lag behind their tokens, into that of each token.

    A character of several tokens is the text of the last one. Tokens of which a stop string left nothing are
    no piece.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._vocab_size = tokenizer.vocab_size
        self._detokenizer = Detokenizer(tokenizer)
        self._tokens: deque[tuple[int, TokenLogprob | None]] = deque()  # lengths of texts still to come
        self._text = ""

    def cut(self, delta: Delta) -> Iterator[Piece]:
        """The pieces that are complete with `delta`."""
        for token_id, logprob in zip_longest(delta.token_ids, delta.logprobs or ()):
            is_text = token_id < self._vocab_size
            self._tokens.append((len(self._detokenizer.push(token_id)) if is_text else 0, logprob))
        self._text += delta.text
        while self._tokens and self._tokens[0][0] <= len(self._text):
            length, logprob = self._tokens.popleft()
            text, self._text = self._text[:length], self._text[length:]
            yield Piece(text, logprob)
        if delta.finish_reason and self._text:
            yield Piece(self._text, self._tokens[0][1] if self._tokens else None)
