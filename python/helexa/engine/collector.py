"""What is wanted of a prompt instead of an answer: logits or logprobs of its tokens, or one vector for it."""

from abc import ABC, abstractmethod
from concurrent.futures import Future
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from helexa.engine.sampler import Sampled, logprobs_of
from helexa.engine.sequence import Finished, Mailbox
from helexa.engine.stream import TokenLogprob
from helexa.errors import DeviceError, HelexaError

Pooling = Literal["mean", "last"]
FloatArray = npt.NDArray[np.float32]


class Collector(ABC):
    """Takes the rows that the model computes, on the device thread, and resolves a future at the end."""

    mailbox: Mailbox | None = None
    wants_hidden = False  # normalised hidden states instead of logits
    wants_all = True  # rows of all tokens, not of the last one only

    def __init__(self) -> None:
        self.future: Future[FloatArray] = Future()
        self.future.set_running_or_notify_cancel()  # who waits may go, and cannot resolve it in between

    @abstractmethod
    def take(self, rows: Any, start: int) -> None:
        """rows: [R, V] or [R, D] float32, of the tokens from `start` on; may be empty."""

    @abstractmethod
    def result(self) -> FloatArray: ...

    def receive(self, event: Sampled | Finished) -> None:
        if self.future.done() or not isinstance(event, Finished):
            return
        try:
            if event.error is not None:
                raise event.error
            self.future.set_result(self.result())
        except HelexaError as error:
            self.future.set_exception(error)


class LogitsCollector(Collector):
    """Logits [T, V] float32 after each token."""

    def __init__(self, num_tokens: int, vocab_size: int):
        super().__init__()
        self._logits = np.empty((num_tokens, vocab_size), np.float32)

    def take(self, rows: Any, start: int) -> None:
        self._logits[start : start + len(rows)] = rows.numpy()

    def result(self) -> FloatArray:
        return self._logits


class EmbeddingCollector(Collector):
    """One vector [D] float32 of length 1: the mean of the hidden states, or the last one."""

    wants_hidden = True

    def __init__(self, pooling: Pooling):
        super().__init__()
        self.wants_all = pooling == "mean"
        self._sum: npt.NDArray[np.float64] | None = None

    def take(self, rows: Any, start: int) -> None:
        if start == 0:  # a sequence that gave way begins anew
            self._sum = None
        if len(rows):
            part = rows.numpy().sum(axis=0, dtype=np.float64)
            self._sum = part if self._sum is None else self._sum + part

    def result(self) -> FloatArray:
        assert self._sum is not None
        length = float(np.linalg.norm(self._sum))
        if not 0.0 < length < np.inf:
            raise DeviceError(f"the hidden states are not usable: their sum has the length {length}")
        return (self._sum / length).astype(np.float32)


class LogprobsCollector(Collector):
    """How likely each token of the prompt was after those before it; nothing is known of the first."""

    def __init__(self, tokens: list[int], num_top: int):
        super().__init__()
        self._tokens = tokens
        self._num_top = num_top
        self.found: list[TokenLogprob | None] = [None]

    def take(self, rows: Any, start: int) -> None:
        del self.found[start + 1 :]  # a sequence that gave way begins anew
        for logits, token_id in zip(rows.numpy(), self._tokens[start + 1 :], strict=False):
            logprob, top = logprobs_of(logits.max() - logits, token_id, self._num_top)
            self.found.append(TokenLogprob(token_id, logprob, top))

    def result(self) -> FloatArray:
        return np.array([0.0 if item is None else item.logprob for item in self.found], np.float32)
