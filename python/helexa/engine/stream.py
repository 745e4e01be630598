"""The asyncio side of a request: events cross from the device thread, and become text."""

import asyncio
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from helexa.engine.sampler import Sampled
from helexa.engine.sequence import Finished, Receiver, Sequence
from helexa.engine.stop import StopStrings
from helexa.engine.tokenizer import Detokenizer, Tokenizer


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability and the most likely alternatives, as (token id, log-probability)."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took. Times of phases that it never reached are 0."""

    prompt_tokens: int
    completion_tokens: int  # with the token that ended the text, which has no text itself
    cached_tokens: int  # of the prompt, served from the prefix cache
    prefill_tokens: int  # computed, again after a preemption
    queue_ms: float
    prefill_ms: float  # from admission to the first token
    decode_ms: float  # from the first token to the last
    reasoning_tokens: int = 0  # of the completion, in the block that SamplingParams.thinking describes


@dataclass(frozen=True, slots=True)
class Delta:
    """What one or more new tokens add to an answer; the last one has a finish reason and the usage.

    `text` may lag behind `token_ids` by what could become a stop string or an unfinished character.
    """

    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    stop: str | None = None  # the stop string that ended the text


class LoopMailbox:
    """Hands batches of events to their receivers on one event loop, with one wake-up for all that wait."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._batches: deque[list[tuple[Receiver, Sampled | Finished]]] = deque()
        self._lock = threading.Lock()
        self._is_scheduled = False

    def post(self, batch: list[tuple[Receiver, Sampled | Finished]]) -> bool:
        """Called on the device thread; False if the loop is closed."""
        with self._lock:
            self._batches.append(batch)
            if self._is_scheduled:
                return not self._loop.is_closed()
            self._is_scheduled = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop is closed
            return False
        return True

    def _deliver(self) -> None:
        with self._lock:
            batches, self._batches = self._batches, deque()
            self._is_scheduled = False
        for batch in batches:
            for receiver, event in batch:
                receiver.receive(event)


class Stream:
    """The events of one sequence, in order; those that wait are taken together."""

    def __init__(self, mailbox: LoopMailbox, loop: asyncio.AbstractEventLoop):
        self.mailbox = mailbox
        self._loop = loop
        self._events: list[Sampled | Finished] = []
        self._waiter: asyncio.Future[None] | None = None

    def receive(self, event: Sampled | Finished) -> None:
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Sampled | Finished]:
        """All events that came since the last call; at least one."""
        while not self._events:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self._events = self._events, []
        return events


class Answer:
    """Builds the deltas of one sequence from its events: detokenizes, holds back stop strings, counts.

    Stop strings are those of the answer: the text of a thinking block does not end it.
    """

    def __init__(
        self, sequence: Sequence, tokenizer: Tokenizer | None, stop: tuple[str, ...], logprobs: bool
    ):
        self._sequence = sequence
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        # Models may have more tokens than their vocabulary; the surplus has no text.
        self._vocab_size = 0 if tokenizer is None else tokenizer.vocab_size
        self._stop = StopStrings(stop)
        self._has_logprobs = logprobs
        self._num_tokens = 0
        self._num_reasoning = 0

    def feed(self, events: list[Sampled | Finished]) -> Delta:
        """The delta of all these events, none of which is an error."""
        token_ids: list[int] = []
        logprobs: list[TokenLogprob] | None = [] if self._has_logprobs else None
        text = ""
        for event in events:
            if isinstance(event, Finished):
                piece, reason = self._flush(event.reason)
                return Delta(text + piece, token_ids, logprobs, reason, self.usage(), self._stop.hit)
            self._num_tokens += 1
            self._num_reasoning += event.is_thinking
            if event.token_id in self._sequence.stop_token_ids:
                continue
            token_ids.append(event.token_id)
            if logprobs is not None and event.logprob is not None:
                logprobs.append(TokenLogprob(event.token_id, event.logprob, event.top))
            if self._detokenizer is not None and event.token_id < self._vocab_size:
                piece = self._detokenizer.push(event.token_id)
                if event.is_thinking:
                    text += self._stop.flush() + piece
                    continue
                piece, hit = self._stop.push(piece)
                text += piece
                if hit is not None:
                    return Delta(text, token_ids, logprobs, "stop", self.usage(), hit)
        return Delta(text, token_ids, logprobs)

    def usage(self) -> Usage:
        """What the sequence has taken so far."""
        sequence = self._sequence
        admitted_s = sequence.admitted_s or time.perf_counter()
        first_s = sequence.first_token_s or admitted_s
        last_s = sequence.last_token_s or first_s
        return Usage(
            prompt_tokens=sequence.num_prompt_tokens,
            completion_tokens=self._num_tokens,
            cached_tokens=sequence.cached_tokens,
            prefill_tokens=sequence.prefilled_tokens,
            queue_ms=(admitted_s - sequence.arrived_s) * 1e3,
            prefill_ms=(first_s - admitted_s) * 1e3,
            decode_ms=(last_s - first_s) * 1e3,
            reasoning_tokens=self._num_reasoning,
        )

    def _flush(self, reason: str) -> tuple[str, str]:
        """The text still held back, and the finish reason: it may complete a stop string after all."""
        if self._detokenizer is None:
            return "", reason
        piece, hit = self._stop.push(self._detokenizer.flush())
        return piece + self._stop.flush(), reason if hit is None else "stop"
