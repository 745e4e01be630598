import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.engine.pages import PagePool
from helexa.engine.prefix_cache import PrefixCache


@pytest.fixture
def pool():
    return PagePool(8, 4)


@pytest.fixture
def cache(pool):
    return PrefixCache(pool)


def store(pool, cache, tokens, namespace=""):
    """Inserts the tokens as a sequence would, which has ended since; returns the nodes."""
    node, nodes = cache.root, []
    for start in range(0, len(tokens), 4):
        page = pool.allocate()
        node = cache.insert(node, tuple(tokens[start : start + 4]), page, namespace)
        pool.release(page)
        nodes.append(node)
    return nodes


def matched(cache, tokens, namespace=""):
    match = cache.match(tokens, len(tokens), namespace)
    return 4 * len(match.nodes) + match.num_partial


def test_an_empty_cache_matches_nothing(cache):
    assert matched(cache, [1, 2, 3]) == 0


def test_full_pages_are_shared_and_a_part_of_a_page_counts_to_the_token(pool, cache):
    nodes = store(pool, cache, [1, 2, 3, 4, 5, 6, 7])
    match = cache.match([1, 2, 3, 4, 5, 6, 9, 9], 8)
    assert match.nodes == nodes[:1]
    assert (match.partial, match.num_partial) == (nodes[1], 2)


def test_the_limit_cuts_a_page_that_would_match_in_full(pool, cache):
    nodes = store(pool, cache, [1, 2, 3, 4])
    match = cache.match([1, 2, 3, 4], 3)
    assert (match.nodes, match.partial, match.num_partial) == ([], nodes[0], 3)


def test_of_several_branches_the_longest_match_is_taken(pool, cache):
    store(pool, cache, [1, 2, 3, 4])
    (other,) = store(pool, cache, [1, 2, 8, 9])
    match = cache.match([1, 2, 8, 7], 4)
    assert (match.partial, match.num_partial) == (other, 3)


def test_namespaces_do_not_see_each_other(pool, cache):
    store(pool, cache, [1, 2, 3, 4], "a")
    assert matched(cache, [1, 2, 3, 4], "a") == 4
    assert matched(cache, [1, 2, 3, 4], "b") == 0


def test_a_page_that_continues_a_shorter_one_takes_its_place(pool, cache):
    store(pool, cache, [1, 2])
    store(pool, cache, [1, 2, 3, 4])
    assert [node.token_ids for node in cache.nodes()] == [(1, 2, 3, 4)]
    assert (pool.num_cached, pool.num_free) == (1, 7)


def test_what_a_longer_page_covers_is_not_stored_again(pool, cache):
    store(pool, cache, [1, 2, 3, 4])
    store(pool, cache, [1, 2])
    assert [node.token_ids for node in cache.nodes()] == [(1, 2, 3, 4)]
    assert (pool.num_cached, pool.num_free) == (1, 7)


def test_a_page_may_grow_while_its_sequence_still_holds_it(pool, cache):
    page = pool.allocate()
    short = cache.insert(cache.root, (1, 2), page)
    assert cache.insert(cache.root, (1, 2, 3), page) is short
    assert short.token_ids == (1, 2, 3)
    pool.release(page)
    assert (pool.num_cached, pool.num_free) == (1, 7)


def test_eviction_takes_the_least_recently_used_leaf_first(pool, cache):
    store(pool, cache, [1, 1, 1, 1])
    store(pool, cache, [2, 2, 2, 2])
    matched(cache, [1, 1, 1, 1])
    assert cache.evict(1) == 1
    assert matched(cache, [1, 1, 1, 1]) == 4
    assert matched(cache, [2, 2, 2, 2]) == 0


def test_eviction_shortens_a_prefix_from_its_end(pool, cache):
    store(pool, cache, [1, 1, 1, 1, 2, 2, 2, 2, 3])
    assert cache.evict(2) == 2
    assert matched(cache, [1, 1, 1, 1, 2, 2, 2, 2, 3]) == 4


def test_pages_that_a_sequence_holds_are_never_evicted(pool, cache):
    nodes = store(pool, cache, [1, 1, 1, 1, 2, 2])
    for node in nodes:
        pool.retain(node.page)
    assert cache.evict(8) == 0
    pool.release(nodes[1].page)
    assert cache.evict(8) == 1


def test_evicting_everything_leaves_an_empty_tree(pool, cache):
    for namespace in ("a", "b"):
        store(pool, cache, [1, 2, 3, 4, 5], namespace)
    assert cache.evict(100) == 4
    assert list(cache.nodes()) == []
    assert cache.root.children == {}
    assert pool.num_free == 8


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.booleans()), min_size=1, max_size=25
    )
)
def test_a_match_is_the_longest_prefix_of_anything_stored(histories):
    pool = PagePool(100, 4)
    cache = PrefixCache(pool)
    stored: list[list[int]] = []
    for tokens, is_query in histories:
        if is_query:
            common = max((_common(tokens, other) for other in stored), default=0)
            assert matched(cache, tokens) == common
        else:
            store(pool, cache, tokens)
            stored.append(tokens)
        pages = [node.page for node in cache.nodes()]
        assert len(pages) == len(set(pages)) == pool.num_cached
        assert pool.num_free == 100 - len(pages)
        _check_siblings(cache)


def _common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _check_siblings(cache):
    for node in [cache.root, *cache.nodes()]:
        if node is not cache.root and len(node.token_ids) < 4:
            assert not node.children
        runs = [child.token_ids for siblings in node.children.values() for child in siblings]
        for i, run in enumerate(runs):
            assert all(other[: len(run)] != run for other in runs[:i] + runs[i + 1 :])
