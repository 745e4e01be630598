"""A model that proves its cache: it writes token ids into the pages and predicts from all it reads back."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from helexa.engine.sampler import Sampler, SamplingParams
from helexa.engine.tokenizer import Tokenizer


def next_token(history: Iterable[int], vocab_size: int) -> int:
    """A function of every token so far and of their order."""
    state = 0
    for token_id in history:
        state = (state * 31 + int(token_id) + 7) % 1_000_003
    return state % vocab_size


def continuation(prompt: list[int], num_tokens: int, vocab_size: int) -> list[int]:
    """What the history model generates greedily after the prompt."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, vocab_size))
    return tokens[len(prompt) :]


@dataclass
class HistoryModel:
    """model(step) -> one-hot logits of next_token; AssertionError if a page is wrong."""

    vocab_size: int
    config: object = None
    fail_with: Exception | None = None
    num_calls: int = 0

    def __call__(self, step):
        self.num_calls += 1
        if self.fail_with is not None:
            raise self.fail_with
        k, v = step.k_cache[0], step.v_cache[0]
        page_tokens = k.shape[2]
        for token_id, position, slot in zip(
            step.token_ids.tolist(), step.positions.tolist(), step.slots.tolist(), strict=True
        ):
            k[slot // page_tokens, 0, slot % page_tokens, 0] = token_id
            v[slot // page_tokens, 0, slot % page_tokens, 0] = position
        wanted = range(len(step.token_ids))[step.logits_rows]
        logits = torch.zeros(len(wanted), self.vocab_size)
        starts = step.query_start.tolist()
        for s, length in enumerate(step.kv_lengths.tolist()):
            positions = torch.arange(length)
            pages = step.page_table[s].long()[positions // page_tokens]
            history = k[pages, 0, positions % page_tokens, 0].long().tolist()
            assert v[pages, 0, positions % page_tokens, 0].long().tolist() == list(range(length))
            for row in range(starts[s], starts[s + 1]):
                if row in wanted:
                    end = length - (starts[s + 1] - 1 - row)
                    logits[row - wanted.start, next_token(history[:end], self.vocab_size)] = 1.0
        return logits


@dataclass
class StateModel(HistoryModel):
    """Predicts the same from recurrent states, which hold what next_token has made of all tokens so far."""

    def __call__(self, step):
        super().__call__(step)
        states = step.states[0]
        wanted = range(len(step.token_ids))[step.logits_rows]
        logits = torch.zeros(len(wanted), self.vocab_size)
        starts, tokens = step.query_start.tolist(), step.token_ids.tolist()
        for s, (slot, length) in enumerate(
            zip(step.state_slots.tolist(), step.kv_lengths.tolist(), strict=True)
        ):
            is_fresh = length == starts[s + 1] - starts[s]
            state = 0 if is_fresh else int(states[slot, 0, 0, 0])
            for row in range(starts[s], starts[s + 1]):
                state = (state * 31 + tokens[row] + 7) % 1_000_003
                if row in wanted:
                    logits[row - wanted.start, state % self.vocab_size] = 1.0
            states[slot] = state
        return logits


class Largest:
    """Stands in for a device that chooses: the largest logit of each row."""

    def __init__(self, vocab_size, num_slots, max_rows):
        self.last_tokens = torch.zeros(num_slots, dtype=torch.int32)
        self.records = torch.zeros(max_rows, 1, dtype=torch.int32)
        self.allowed = {}

    def serves(self, params):
        return params.typical_p == 1.0

    def bind(self, slot, sampler, token_ids, num_prompt_tokens):
        self.allowed.pop(slot, None)

    def allow(self, slot, allowed):
        if isinstance(allowed, int):
            allowed = np.arange(10_000) == allowed
        self.allowed[slot] = allowed

    def launch(self, logits, slots, positions, *, greedy_only=False):
        for row, slot in enumerate(slots.tolist()):
            scores = logits[row].clone()
            if (allowed := self.allowed.get(slot)) is not None:
                scores[~torch.from_numpy(allowed[: len(scores)])] = -torch.inf
            self.last_tokens[slot] = self.records[row, 0] = scores.argmax()

    def read(self, records, row, slot):
        return int(records[row, 0]), None, []


@pytest.fixture(scope="session")
def history_model():
    return HistoryModel


@pytest.fixture(scope="session")
def state_model():
    return StateModel


@pytest.fixture(scope="session")
def largest():
    """Stands in for a device that chooses the tokens."""
    return Largest


@pytest.fixture(scope="session")
def greedy():
    """A sampler that chooses the largest logit; it keeps nothing of its sequence."""
    return Sampler(SamplingParams(temperature=0.0).resolve(), [])


@pytest.fixture(scope="session")
def expected():
    """continuation(prompt, num_tokens, vocab_size) of the history model."""
    return continuation


@pytest.fixture(scope="session")
def history():
    """next_token(history, vocab_size) of the history model."""
    return next_token


def byte_tokenizer(pre="smollm", merges=('{ "', '" :', "\\n \\n"), end="<|im_end|>", markers=True):
    """A tokenizer of all bytes, a few merges, a control token and, if wanted, markers of thinking."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    merges = [merge.replace("\\n", spelled[10]) for merge in merges]
    tokens = [spelled[byte] for byte in range(256)] + [merge.replace(" ", "") for merge in merges]
    types = [1] * len(tokens)
    for text, kind in [("<|im_start|>", 3), (end, 3)] + ([("<think>", 4), ("</think>", 4)] * markers):
        if text:
            tokens.append(text)
            types.append(kind)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }
    if end:
        metadata["tokenizer.ggml.eos_token_id"] = tokens.index(end)
    return Tokenizer.from_gguf(metadata)


@pytest.fixture(scope="session")
def make_tokenizer():
    return byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()
