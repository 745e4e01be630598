"""A tree over token ids whose nodes are pages of the KV cache.

The path from the root to a node spells the tokens whose keys and values its pages hold. Full pages are shared
by reference. A page is valid up to the length of its node's tokens and only ever appended to, so whoever
matches a part of it copies that part; pages that are not full are always leaves. Siblings may begin with the
same tokens but none is a prefix of another. A node is a stable boundary: whatever else describes the state
after its tokens may hang on it.
"""

import heapq
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from helexa.engine.pages import SCRATCH_PAGE, PagePool


@dataclass(eq=False, slots=True)
class Node:
    """One page of keys and values, valid for the first len(token_ids) positions."""

    token_ids: tuple[int, ...]
    page: int
    key: Hashable
    parent: "Node | None"
    children: dict[Hashable, "list[Node]"] = field(default_factory=dict)
    last_used: int = 0


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix: full pages to share, then num_partial tokens of one more to copy."""

    nodes: list[Node]
    partial: Node | None = None
    num_partial: int = 0


class PrefixCache:
    """Finds, keeps and evicts prefixes; all pages it keeps are marked so in the pool."""

    def __init__(self, pool: PagePool):
        self._pool = pool
        self._clock = 0
        self.root = Node((), SCRATCH_PAGE, None, None)

    def match(self, token_ids: Sequence[int], limit: int, namespace: str = "") -> Match:
        """The longest prefix of token_ids[:limit] that is cached in the namespace."""
        page_tokens = self._pool.page_tokens
        self._clock += 1
        nodes: list[Node] = []
        node = self.root
        start = 0
        while start < limit:
            end = min(start + page_tokens, limit)
            run = tuple(token_ids[start:end])
            best, shared = self._closest(node, run, namespace)
            if best is None:
                break
            best.last_used = self._clock
            if shared < page_tokens:
                return Match(nodes, best, shared)
            nodes.append(best)
            node, start = best, end
        return Match(nodes)

    def find(self, parent: Node, run: tuple[int, ...], namespace: str = "") -> Node | None:
        """The child of `parent` that holds exactly the full page `run`, if there is one."""
        for node in parent.children.get(self._key(parent, run, namespace), ()):
            if node.token_ids == run:
                self._clock += 1
                node.last_used = self._clock
                return node
        return None

    def insert(self, parent: Node, run: tuple[int, ...], page: int, namespace: str = "") -> Node:
        """The node that holds `run` below `parent`: an older one that covers it, or one that keeps `page`.

        A shorter node that `run` continues gives way to the new page.
        """
        key = self._key(parent, run, namespace)
        siblings = parent.children.setdefault(key, [])
        self._clock += 1
        for node in siblings:
            if node.token_ids[: len(run)] == run:
                node.last_used = self._clock
                return node
            if run[: len(node.token_ids)] == node.token_ids:
                if node.page != page:
                    self._pool.drop(node.page)
                    self._pool.keep(page)
                node.page, node.token_ids, node.last_used = page, run, self._clock
                return node
        self._pool.keep(page)
        node = Node(run, page, key, parent, last_used=self._clock)
        siblings.append(node)
        return node

    def evict(self, num_pages: int) -> int:
        """Frees up to num_pages pages that nobody holds, oldest leaves first; returns how many."""
        heap = [(node.last_used, id(node), node) for node in self.nodes() if self._is_evictable(node)]
        heapq.heapify(heap)
        freed = 0
        while heap and freed < num_pages:
            node = heapq.heappop(heap)[2]
            self._pool.drop(node.page)
            freed += 1
            parent = self._detach(node)
            if parent is not self.root and self._is_evictable(parent):
                heapq.heappush(heap, (parent.last_used, id(parent), parent))
        return freed

    def nodes(self) -> Iterator[Node]:
        """Every node but the root, parents before children."""
        pending = [self.root]
        while pending:
            for siblings in pending.pop().children.values():
                yield from siblings
                pending.extend(siblings)

    def _key(self, parent: Node, run: Sequence[int], namespace: str) -> Hashable:
        return (namespace, run[0]) if parent is self.root else run[0]

    def _closest(self, parent: Node, run: tuple[int, ...], namespace: str) -> tuple[Node | None, int]:
        best, shared = None, 0
        for node in parent.children.get(self._key(parent, run, namespace), ()):
            length = _common_length(node.token_ids, run)
            if length > shared:
                best, shared = node, length
        return best, shared

    def _is_evictable(self, node: Node) -> bool:
        return not node.children and self._pool.holders(node.page) == 0

    def _detach(self, node: Node) -> Node:
        parent = node.parent
        assert parent is not None
        siblings = parent.children[node.key]
        siblings.remove(node)
        if not siblings:
            del parent.children[node.key]
        return parent


def _common_length(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many leading elements a and b share, by bisection over slices."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
