"""What may come next in one sequence: a thinking block of bounded length, then text that follows a grammar.

Markers are found in the bytes of the tokens, so a marker may be one token or many. Nothing here knows of
logits, batches or pages: the state advances by the tokens that were chosen, and by nothing else.
"""

from collections import deque
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from helexa.engine.grammar import Matcher
from helexa.engine.tokenizer import Tokenizer
from helexa.errors import InvalidParameter

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Thinking:
    """How a model marks the block in which it thinks, and how long that may become.

    open: the prompt ends inside the block.   budget: tokens of the block, None for no bound.
    closing: what is written when the budget is spent; it contains `end`.
    """

    open: bool
    start: str = "<think>"
    end: str = "</think>"
    budget: int | None = None
    closing: str = "\n</think>\n\n"

    def __post_init__(self) -> None:
        if not self.start or not self.end or self.end not in self.closing:
            message = f"thinking has start {self.start!r}, end {self.end!r} and closing {self.closing!r}"
            raise InvalidParameter(f"{message}; expected text, and the end within the closing")
        if self.budget is not None and self.budget < 0:
            message = f"thinking_budget is {self.budget}; expected a number of tokens"
            raise InvalidParameter(message, param="thinking_budget")


class _Phase(Enum):
    START = auto()  # nothing was written yet, or nothing since the last block, or the beginning of a marker
    INSIDE = auto()
    ANSWER = auto()


class Guide:
    """The constraint of one sequence: `next` says what may come, `accept` is told what was chosen."""

    def __init__(self, tokenizer: Tokenizer, thinking: Thinking | None, matcher: Matcher | None):
        self.is_thinking = False  # the token that was accepted last belongs to the thinking block
        self.is_complete = False  # the grammar allows nothing more
        self._tokenizer = tokenizer
        self._matcher = matcher
        self._thinking = thinking
        self._forced: deque[int] = deque()
        self._then = _Phase.ANSWER  # what follows the forced tokens
        self._seen = b""  # the end of the text, as far as a marker may begin in it
        self._num_thought = 0
        self._is_behind_block = False
        self._phase = _Phase.ANSWER
        if thinking is not None:
            self._enter(_Phase.INSIDE if thinking.open else _Phase.START)

    def next(self) -> int | BoolArray | None:
        """The token that must come next, or which ones may, or None if any may."""
        if self._forced:
            return self._forced[0]
        if self._matcher is None:
            return self._unopened() if self._phase is _Phase.START else None
        if self._phase is _Phase.INSIDE:
            return None
        allowed = self._matcher.allowed()
        if self._phase is _Phase.START and (opening := self._opening()):
            allowed[opening[0]] = True
        elif np.count_nonzero(allowed) == 1:
            return int(allowed.argmax())
        return allowed

    def accept(self, token_id: int) -> int:
        """The token that takes the place of the chosen one: nearly always itself."""
        if self._forced:
            token_id = self._forced.popleft()
            self.is_thinking = True
            if not self._forced:
                self._enter(self._then)
            return token_id
        if self._phase is _Phase.INSIDE:
            return self._think(token_id)
        if self._phase is _Phase.START and not self._is_answer(token_id):
            return token_id
        self.is_thinking = False
        if self._matcher is not None:
            self._matcher.consume(token_id)
            self.is_complete = self._matcher.is_complete
        return token_id

    @property
    def may_replace(self) -> bool:
        """Whether `accept` may put another token in the place of the next one that it is told."""
        return self._matcher is not None and self._phase is _Phase.INSIDE and not self._forced

    def _is_answer(self, token_id: int) -> bool:
        """Whether the answer begins without a thinking block; with a grammar, the first token decides."""
        assert self._thinking is not None
        if self._matcher is not None:
            opening = self._opening()
            if opening[:1] != [token_id] or (len(opening) > 1 and self._matcher.allows(token_id)):
                self._phase = _Phase.ANSWER
            else:
                self.is_thinking = True
                self._force(opening[1:], _Phase.INSIDE)
            return self._phase is _Phase.ANSWER
        start = self._thinking.start.encode()
        self._seen = (self._seen + self._bytes(token_id)).lstrip()
        if self._seen.startswith(start):
            self._seen = self._seen[len(start) :]
            self.is_thinking = True
            self._enter(_Phase.INSIDE)
        else:
            self.is_thinking = self.is_thinking and not self._seen  # blank lines belong to the block
            if not start.startswith(self._seen):
                self._phase = _Phase.ANSWER
        return self._phase is _Phase.ANSWER

    def _think(self, token_id: int) -> int:
        assert self._thinking is not None
        self.is_thinking = True
        if self._matcher is not None and token_id in self._tokenizer.eos_token_ids:
            self._close()  # the grammar's text is still to come
            return self.accept(token_id)
        end = self._thinking.end.encode()
        seen = self._seen + self._bytes(token_id)
        place = seen.find(end)
        if place < 0:
            self._seen = seen[max(0, len(seen) - len(end) + 1) :]
            self._num_thought += 1
            self._check_budget()
        elif self._matcher is None:
            self._seen = seen[place + len(end) :].lstrip()
            is_open = self._thinking.start.encode().startswith(self._seen)
            self._enter(_Phase.START if is_open else _Phase.ANSWER)
            self._is_behind_block = True
        else:
            # What the model puts between block and answer is no part of the grammar's text.
            between = self._thinking.closing.partition(self._thinking.end)[2]
            if place + len(end) < len(seen):  # the token goes on behind the marker
                missing = seen[len(self._seen) : place + len(end)].decode(errors="ignore")
                self._force(self._tokenizer.encode(missing + between), _Phase.ANSWER)
                return self.accept(token_id)
            self._force(self._tokenizer.encode(between), _Phase.ANSWER)
        return token_id

    def _bytes(self, token_id: int) -> bytes:
        # Models may have more tokens than their vocabulary; the surplus has no text.
        return self._tokenizer.token_bytes(token_id) if token_id < self._tokenizer.vocab_size else b""

    def _opening(self) -> list[int]:
        """The tokens of the start marker, if the block may be opened."""
        assert self._thinking is not None
        return [] if self._thinking.budget == 0 else self._tokenizer.encode(self._thinking.start)

    def _unopened(self) -> BoolArray | None:
        """All tokens but the one that would open the next block, where the last one has spent the budget."""
        if not (self._is_behind_block and self._is_spent):
            return None
        assert self._thinking is not None
        opening = self._tokenizer.encode(self._thinking.start)
        if len(opening) > 1:  # other texts begin like it; should it be one, it is closed at once
            return None
        allowed = np.ones(self._tokenizer.vocab_size, np.bool_)
        allowed[opening] = False
        return allowed

    @property
    def _is_spent(self) -> bool:
        assert self._thinking is not None
        return self._thinking.budget is not None and self._num_thought >= self._thinking.budget

    def _enter(self, phase: _Phase) -> None:
        self._phase = phase
        if phase is _Phase.INSIDE:
            self._check_budget()

    def _check_budget(self) -> None:
        if self._is_spent:
            self._close()

    def _close(self) -> None:
        assert self._thinking is not None
        self._seen = b""
        self._is_behind_block = True
        then = _Phase.START if self._matcher is None else _Phase.ANSWER
        self._force(self._tokenizer.encode(self._thinking.closing), then)

    def _force(self, token_ids: list[int], then: _Phase) -> None:
        self._forced.extend(token_ids)
        self._then = then
        if not token_ids:
            self._enter(then)
