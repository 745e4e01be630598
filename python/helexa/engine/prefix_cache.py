"""A tree over token ids whose nodes are pages of the KV cache.

The path from the root to a node spells the tokens whose keys and values its pages hold. Full pages are shared
by reference. A page is valid up to the length of its node's tokens and only ever appended to, so whoever
matches a part of it copies that part; pages that are not full are always leaves. Siblings may begin with the
same tokens but none is a prefix of another. Of models with recurrent layers, snapshots of the state hang on
the nodes, and prefixes reach only as far as these.
"""

import heapq
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from helexa.engine.pages import SCRATCH_PAGE, PagePool
from helexa.engine.snapshots import Snapshot, Snapshots


@dataclass(eq=False, slots=True)
class Node:
    """One page of keys and values, valid for the first len(token_ids) positions."""

    token_ids: tuple[int, ...]
    page: int
    key: Hashable
    parent: "Node | None"
    children: dict[Hashable, "list[Node]"] = field(default_factory=dict)
    snapshots: dict[int, Snapshot] = field(default_factory=dict)  # by how many of the tokens they follow
    last_used: int = 0
    name: str = ""  # in the state store, if the page is full; made when needed
    num_saved: int = 0  # tokens that the state store has been given

    @property
    def namespace(self) -> str:
        """Of a page that begins a prefix."""
        assert isinstance(self.key, tuple)
        return str(self.key[0])


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix: full pages to share, then num_partial tokens of one more to copy."""

    nodes: list[Node]
    partial: Node | None = None
    num_partial: int = 0
    snapshot: Snapshot | None = None  # of the state after all of them

    @property
    def num_tokens(self) -> int:
        return sum(len(node.token_ids) for node in self.nodes) + self.num_partial

    @property
    def pages(self) -> list[int]:
        """Those to share, then the one to copy."""
        return [node.page for node in (*self.nodes, self.partial) if node is not None]

    def without_partial(self) -> "Match":
        """What is left where there is no room for a copy; a state would belong to more tokens."""
        return Match(self.nodes if self.snapshot is None else [])


class PrefixCache:
    """Finds, keeps and evicts prefixes; all pages it keeps are marked so in the pool."""

    def __init__(self, pool: PagePool, snapshots: Snapshots | None = None):
        """With `snapshots`, what is cached is of use only where there is one."""
        self.snapshots = snapshots
        self.on_evict: Callable[[Node], None] | None = None
        self._pool = pool
        self._clock = 0
        self.root = Node((), SCRATCH_PAGE, None, None)

    def match(self, token_ids: Sequence[int], limit: int, namespace: str = "") -> Match:
        """The longest prefix of token_ids[:limit] that can be continued in the namespace."""
        if self.snapshots is not None:
            return self._match_state(token_ids, limit, namespace)
        return self.match_pages(token_ids, limit, namespace)

    def match_pages(self, token_ids: Sequence[int], limit: int, namespace: str = "") -> Match:
        """The longest prefix whose keys and values are cached, with or without a state."""
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

    def _match_state(self, token_ids: Sequence[int], limit: int, namespace: str) -> Match:
        """The longest prefix that a snapshot follows."""
        page_tokens = self._pool.page_tokens
        path: list[Node] = []
        found = Match([])
        node: Node | None = self.root
        start = 0
        while node is not None and start < limit:
            run = tuple(token_ids[start : min(start + page_tokens, limit)])
            siblings = node.children.get(self._key(node, run, namespace), ())
            shared = [(_common_length(sibling.token_ids, run), sibling) for sibling in siblings]
            node = next((sibling for length, sibling in shared if length == page_tokens), None)
            offset, owner = max(
                (
                    (offset, sibling)
                    for length, sibling in shared
                    for offset in sibling.snapshots
                    if offset <= length
                ),
                key=itemgetter(0),
                default=(0, None),
            )
            if owner is not None and offset == page_tokens:
                found = Match([*path, owner], snapshot=owner.snapshots[offset])
            elif owner is not None:
                found = Match(path[:], owner, offset, owner.snapshots[offset])
            if node is not None:
                path.append(node)
            start += page_tokens
        self._use(found)
        return found

    def _use(self, match: Match) -> None:
        self._clock += 1
        for node in (*match.nodes, match.partial):
            if node is not None:
                node.last_used = self._clock
        if self.snapshots is not None and match.snapshot is not None:
            self.snapshots.touch(match.snapshot)

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
            if self.on_evict is not None:
                self.on_evict(node)
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
        if self.snapshots is not None:
            for snapshot in list(node.snapshots.values()):
                self.snapshots.drop(snapshot)
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
