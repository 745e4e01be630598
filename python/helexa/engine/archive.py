"""What a model's caches hold, given to the state store and fetched from there by the tokens that led to it.

A full page is an entry by itself, named after all tokens up to its end. A tail is where something ended: the
tokens beyond the last full page, with the recurrent states, if the model has any, after them. All of it is
saved while there is nothing else to do, what is evicted before that at once, as far as the disk keeps up.
Lives on the device thread, but for the thread that writes.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from helexa import ops
from helexa.engine.cache import KVCache, StateCache
from helexa.engine.device import HostCopy
from helexa.engine.prefix_cache import Node, PrefixCache
from helexa.engine.snapshots import Snapshot
from helexa.engine.state_store import StateStore, Stored, tail_name

_FORMAT = "helexa cache 1"
_MOST_PENDING = 4  # entries that wait for the disk


@dataclass(frozen=True, slots=True)
class _Item:
    """The first `length` tokens of a node, to be saved: as a tail, or else as the full page that they are."""

    node: Node
    length: int
    slot: int | None  # of the state after them
    is_tail: bool


class Archive:
    """One model's part of a store. `model_key` says which weights the model has."""

    def __init__(
        self, store: StateStore, model_key: str, cache: KVCache, states: StateCache, prefix: PrefixCache
    ):
        self._store = store
        self._cache, self._states, self._prefix = cache, states, prefix
        self._is_hybrid = bool(states.conv)
        layers = (*cache.k, *cache.v, *states.conv, *states.recurrent)
        shapes = [(layer.shape[1:], str(layer.dtype)) for layer in layers]
        self._key = _digest(f"{_FORMAT} {model_key} {shapes}".encode())
        self._writer = ThreadPoolExecutor(1, "state-writer")
        self._room = threading.Semaphore(_MOST_PENDING)
        prefix.on_evict = self._rescue_node
        if prefix.snapshots is not None:
            prefix.snapshots.on_evict = self._rescue_snapshot

    def find(self, token_ids: Sequence[int], limit: int, namespace: str, known: int) -> list[Stored]:
        """The entries that hold the longest prefix of token_ids[:limit]; none unless longer than `known`."""
        page_tokens = self._cache.page_tokens
        pages: list[Stored] = []
        best: list[Stored] = []
        parent, start = self._root(namespace), 0
        while start < limit:
            run = token_ids[start : min(start + page_tokens, limit)]
            for length in sorted(self._store.lengths(parent)):
                if length > len(run):
                    break
                name = tail_name(parent, length, _name(parent, run[:length]))
                if name in self._store:
                    best = [*pages, Stored(name, start, start + length, True)]
            name = _name(parent, run)
            if len(run) < page_tokens or name not in self._store:
                break
            pages.append(Stored(name, start, start + page_tokens, False))
            if not self._is_hybrid:
                best = pages[:]
            parent, start = name, start + page_tokens
        if not best or best[-1].end <= known:
            return []
        self._store.touch(stored.name for stored in reversed(best))
        return best

    def fetch(self, stored: Stored, page: int, slot: int) -> bool:
        """Puts the entry into the page and the slot; False if it is gone or damaged."""
        data = self._store.get(stored.name)
        if data is None:
            return False
        targets = self._tensors(page, stored.end - stored.start, slot if stored.is_tail else None)
        if len(data) != sum(target.nbytes for target in targets):
            self._store.remove(stored.name)
            return False
        offset = 0
        for target in targets:
            source = torch.frombuffer(data, dtype=target.dtype, count=target.numel(), offset=offset)
            ops.copy_across(target, source.view(target.shape))
            offset += target.nbytes
        return True

    def save_next(self, done: Callable[[], None]) -> bool:
        """Saves the next entry in the background and calls `done` from there; False if there is none."""
        item = next(self._unsaved(), None)
        return item is not None and self._save_later(item, done)

    def save_all(self, deadline_s: float) -> None:
        """Saves what is left until a time of the monotonic clock."""
        for item in self._unsaved():
            if time.monotonic() > deadline_s:
                return
            self._save(item)

    def close(self) -> None:
        """Waits for what is being written; nothing is saved any more."""
        self._prefix.on_evict = None
        if self._prefix.snapshots is not None:
            self._prefix.snapshots.on_evict = None
        self._writer.shutdown()

    def _unsaved(self) -> Iterator[_Item]:
        """The deepest first: what is written last is kept longest, and nothing is of use without the root."""
        for node in reversed(list(self._prefix.nodes())):
            yield from self._items(node)

    def _items(self, node: Node) -> Iterator[_Item]:
        for snapshot in node.snapshots.values():
            if not snapshot.is_saved:
                yield _Item(node, snapshot.offset, snapshot.slot, True)
        length = len(node.token_ids)
        is_full = length == self._cache.page_tokens
        if node.num_saved < length and (is_full or not self._is_hybrid):
            yield _Item(node, length, None, not is_full)

    def _rescue_node(self, node: Node) -> None:
        for item in list(self._items(node)):
            self._save_later(item)

    def _rescue_snapshot(self, snapshot: Snapshot) -> None:
        if not snapshot.is_saved:
            self._save_later(_Item(snapshot.node, snapshot.offset, snapshot.slot, True))

    def _save_later(self, item: _Item, done: Callable[[], None] | None = None) -> bool:
        """Has a copy written; False if too many wait for that, so that this one is not."""
        if not self._room.acquire(blocking=False):
            return False
        name, ancestors = self._mark_saved(item)
        copy = HostCopy(self._tensors(item.node.page, item.length, item.slot))
        try:
            job = self._writer.submit(self._write, name, ancestors, copy)
        except RuntimeError:  # the interpreter ends
            self._room.release()
            return False
        job.add_done_callback(partial(self._written, done))
        return True

    def _written(self, done: Callable[[], None] | None, job: "Future[None]") -> None:
        self._room.release()
        if done is not None:
            done()

    def _save(self, item: _Item) -> None:
        name, ancestors = self._mark_saved(item)
        self._write(name, ancestors, HostCopy(self._tensors(item.node.page, item.length, item.slot)))

    def _write(self, name: str, ancestors: list[str], copy: HostCopy) -> None:
        self._store.put(name, [_bytes(tensor) for tensor in copy.wait()])
        self._store.touch(ancestors)

    def _mark_saved(self, item: _Item) -> tuple[str, list[str]]:
        """The name of the entry and those of the pages before it, the last first; it is not saved again."""
        node = item.node
        if item.slot is not None:
            node.snapshots[item.length].is_saved = True
        else:
            node.num_saved = item.length
        ancestors = self._names(node)
        own = _name(ancestors[0], node.token_ids[: item.length])
        return (tail_name(ancestors[0], item.length, own) if item.is_tail else own), ancestors

    def _names(self, node: Node) -> list[str]:
        """Of the pages before this one, the last first, and of the root."""
        path = [node]
        while (parent := path[-1].parent) is not None and parent is not self._prefix.root:
            path.append(parent)
        names = [self._root(path[-1].namespace)]
        for ancestor in reversed(path[1:]):
            ancestor.name = ancestor.name or _name(names[-1], ancestor.token_ids)
            names.append(ancestor.name)
        return names[::-1]

    def _root(self, namespace: str) -> str:
        return _digest(self._key.encode() + namespace.encode())

    def _tensors(self, page: int, length: int, slot: int | None) -> list[Tensor]:
        """Where the keys and values of so many tokens lie, and the states if there is a slot."""
        tensors = self._cache.parts(page, length)
        if slot is not None:
            tensors += [layer[slot] for layer in (*self._states.conv, *self._states.recurrent)]
        return tensors


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data.cast("B")


def _name(parent: str, token_ids: Sequence[int]) -> str:
    return _digest(parent.encode() + np.array(token_ids, dtype="<i4").tobytes())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
