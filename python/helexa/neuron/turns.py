"""What was generated, kept by conversation, so that a later request continues from it token for token.

A conversation comes back in other words than it was generated in: templates drop earlier reasoning, arguments
of tools are written anew, space around texts is lost. The cached prefix would end there. A turn is therefore
found by a hash over everything that its meaning depends on, in a canonical form, and holds exact tokens.
"""

import hashlib
import json
import struct
import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from helexa.wire.chat import AnswerMessage, Message, ToolCall

_KEY_BYTES = 20
_NO_KEY = bytes(_KEY_BYTES)
_LENGTH = struct.Struct("<I")
_OVERHEAD = 256  # bytes of an entry beside its tokens


@dataclass(frozen=True, eq=False, slots=True)
class Turn:
    """A generated turn and all before it: the tokens of `parent`, then its own."""

    key: bytes
    parent: "Turn | None"
    own: "array[int]"

    @property
    def token_ids(self) -> list[int]:
        parts = [turn.own for turn in self.line()]
        return [token_id for part in reversed(parts) for token_id in part]

    @property
    def num_tokens(self) -> int:
        return sum(len(turn.own) for turn in self.line())

    @property
    def nbytes(self) -> int:
        return len(self.own) * self.own.itemsize + _OVERHEAD

    def line(self) -> "Iterator[Turn]":
        """This turn and its ancestors, back to the first."""
        turn: Turn | None = self
        while turn is not None:
            yield turn
            turn = turn.parent


class TurnStore:
    """Turns by key, at most `max_bytes` of them; those not used for longest go first. For any thread."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._turns: OrderedDict[bytes, Turn] = OrderedDict()
        self._holders: Counter[Turn] = Counter()  # the store itself, and turns that go on from there
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._turns)

    def find(self, keys: Iterable[bytes]) -> Turn | None:
        """The first of `keys` that is kept."""
        with self._lock:
            turn = next((found for key in keys if (found := self._turns.get(key))), None)
            if turn is not None:
                self._touch(turn)
            return turn

    def keep(self, key: bytes, parent: Turn | None, own: Sequence[int]) -> None:
        """Adds a turn, or replaces the one of that key, whose tokens are less likely to be cached."""
        self._keep(Turn(key, parent, array("i", own)))

    def dump(self) -> bytes:
        """All turns, for `restore`."""
        parts = []
        with self._lock:
            for turn in self._turns.values():
                parent, own = turn.parent, turn.own
                if parent is not None and self._turns.get(parent.key) is not parent:
                    parent, own = None, array("i", turn.token_ids)
                parts += [turn.key, _NO_KEY if parent is None else parent.key]
                parts += [_LENGTH.pack(len(own)), own.tobytes()]
        return b"".join(parts)

    def restore(self, data: bytes | bytearray) -> None:
        """Adds what another store has dumped."""
        read = {key: (parent, own) for key, parent, own in _read_turns(memoryview(data))}
        turns: dict[bytes, Turn | None] = {_NO_KEY: None}
        for key in read:
            line = [key]
            while line[-1] not in turns:
                line.append(read[line[-1]][0])
            for one in reversed(line[:-1]):
                parent, own = read[one]
                turns[one] = Turn(one, turns[parent], own)
        for key in read:
            turn = turns[key]
            assert turn is not None
            self._keep(turn)

    def _keep(self, turn: Turn) -> None:
        with self._lock:
            self._hold(turn)
            self._drop(turn.key)
            self._turns[turn.key] = turn
            self._touch(turn)
            while self.nbytes > self.max_bytes:
                self._drop(next(iter(self._turns)))

    def _hold(self, turn: Turn) -> None:
        for one in turn.line():
            self._holders[one] += 1
            if self._holders[one] > 1:
                return
            self.nbytes += one.nbytes

    def _drop(self, key: bytes) -> None:
        """Forgets a turn. It takes room for as long as another goes on from it."""
        turn = self._turns.pop(key, None)
        for one in turn.line() if turn else ():
            self._holders[one] -= 1
            if self._holders[one]:
                return
            del self._holders[one]
            self.nbytes -= one.nbytes

    def _touch(self, turn: Turn) -> None:
        """Ancestors last, so that none of them goes before a turn that needs it."""
        for one in turn.line():
            if self._turns.get(one.key) is one:
                self._turns.move_to_end(one.key)


def _read_turns(data: memoryview) -> "Iterator[tuple[bytes, bytes, array[int]]]":
    while data:
        key, parent = bytes(data[:_KEY_BYTES]), bytes(data[_KEY_BYTES : 2 * _KEY_BYTES])
        (length,) = _LENGTH.unpack_from(data, 2 * _KEY_BYTES)
        own = array("i")
        start = 2 * _KEY_BYTES + _LENGTH.size
        own.frombytes(data[start : start + length * own.itemsize])
        yield key, parent, own
        data = data[start + length * own.itemsize :]


def conversation_keys(root: object, messages: Sequence[Message]) -> list[bytes]:
    """A key for each message, of the conversation up to and with it; `root` is what else it depends on."""
    keys = []
    key = _hash(b"", root)
    for message in messages:
        key = next_key(key, message)
        keys.append(key)
    return keys


def next_key(key: bytes, message: Message | AnswerMessage) -> bytes:
    """The key of a conversation that `message` continues; reasoning and the ids of calls do not count."""
    calls = [_canonical_call(call) for call in message.tool_calls or ()]
    name = message.name if isinstance(message, Message) else None
    return _hash(key, [message.role, name, _text(message.content).strip(), calls])


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.text or part.refusal or "" for part in content)
    return content or ""


def _canonical_call(call: ToolCall) -> list[object]:
    given = call.function.arguments
    arguments: object = given
    if isinstance(given, str):
        try:
            arguments = json.loads(given, parse_float=_number)
        except (ValueError, RecursionError):
            arguments = given.strip()
    return [call.function.name, arguments or {}]


def _number(text: str) -> float:
    """1.0 as 1: JavaScript writes it that way."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _hash(key: bytes, value: object) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(key + text.encode(), digest_size=_KEY_BYTES).digest()
