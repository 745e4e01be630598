import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.engine.pages import SCRATCH_PAGE, PagePool


def test_a_page_is_free_again_when_its_last_holder_lets_go():
    pool = PagePool(2, 4)
    page = pool.allocate()
    pool.retain(page)
    pool.release(page)
    assert (pool.num_used, pool.num_free) == (1, 1)
    pool.release(page)
    assert (pool.num_used, pool.num_free) == (0, 2)


def test_a_kept_page_is_cached_and_not_free_without_holders():
    pool = PagePool(1, 4)
    page = pool.allocate()
    pool.keep(page)
    assert (pool.num_used, pool.num_cached, pool.num_free) == (1, 0, 0)
    pool.release(page)
    assert (pool.num_used, pool.num_cached, pool.num_free) == (0, 1, 0)
    pool.retain(page)
    assert (pool.num_used, pool.num_cached, pool.num_free) == (1, 0, 0)
    pool.drop(page)
    assert (pool.num_used, pool.num_cached, pool.num_free) == (1, 0, 0)
    pool.release(page)
    assert (pool.num_used, pool.num_cached, pool.num_free) == (0, 0, 1)


def test_the_scratch_page_is_never_handed_out():
    pool = PagePool(3, 4)
    assert SCRATCH_PAGE not in [pool.allocate() for _ in range(3)]


def test_the_page_freed_last_is_used_first():
    pool = PagePool(3, 4)
    page = pool.allocate()
    pool.release(page)
    assert pool.allocate() == page


def test_misuse_is_noticed():
    pool = PagePool(1, 4)
    page = pool.allocate()
    pool.release(page)
    for misuse in (pool.release, pool.retain, pool.keep, pool.drop):
        with pytest.raises(AssertionError):
            misuse(page)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_tokens_are_rounded_up_to_pages(tokens, pages):
    assert PagePool(1, 4).pages_for(tokens) == pages


@given(st.lists(st.integers(0, 4), max_size=60), st.data())
def test_used_cached_and_free_always_sum_to_the_pool(operations, data):
    pool = PagePool(5, 4)
    holders: dict[int, int] = {}
    kept: set[int] = set()
    for operation in operations:
        held = [page for page, count in holders.items() if count]
        if operation == 0 and pool.num_free:
            holders[pool.allocate()] = 1
        elif operation == 1 and held:
            page = data.draw(st.sampled_from(held))
            pool.release(page)
            holders[page] -= 1
        elif operation == 2 and (choices := sorted({*held, *kept})):
            page = data.draw(st.sampled_from(choices))
            pool.retain(page)
            holders[page] = holders.get(page, 0) + 1
        elif operation == 3 and (choices := sorted({*held} - kept)):
            page = data.draw(st.sampled_from(choices))
            pool.keep(page)
            kept.add(page)
        elif operation == 4 and kept:
            page = data.draw(st.sampled_from(sorted(kept)))
            pool.drop(page)
            kept.remove(page)
        used = {page for page, count in holders.items() if count}
        assert pool.num_used == len(used)
        assert pool.num_cached == len(kept - used)
        assert pool.num_free == 5 - len(used | kept)
