"""Quotas: rolling windows, reservations, and a truthful time to come back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.errors import QuotaExceeded
from helexa.gateway.auth import Principal
from helexa.gateway.keys import Limit
from helexa.gateway.quota import Ledger, Window


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ledger(clock):
    return Ledger(clock)


def principal(*limits, name="ada"):
    return Principal(name, name, limits=tuple(Limit(*limit) for limit in limits))


def refused(ledger, who, tokens=0):
    with pytest.raises(QuotaExceeded) as caught:
        ledger.charge(who, tokens)
    return caught.value


def test_requests_beyond_the_limit_wait_until_the_first_has_left_the_window(ledger, clock):
    who = principal(("requests", 3, 60))
    for _ in range(3):
        ledger.charge(who, 0)
        clock.now += 10
    error = refused(ledger, who)
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert "3 requests per minute" in error.message
    assert 30 < error.retry_after_s <= 31.1
    clock.now += error.retry_after_s
    ledger.charge(who, 0)
    refused(ledger, who)


def test_a_refusal_takes_nothing_from_any_window(ledger, clock):
    who = principal(("requests", 10, 3600), ("tokens", 100, 60))
    ledger.charge(who, 0).settle(100)
    for _ in range(20):
        refused(ledger, who)
    assert ledger.used(who) == [(who.limits[0], 1), (who.limits[1], 100)]


def test_tokens_count_when_they_have_been_used(ledger, clock):
    who = principal(("tokens", 100, 60))
    charge = ledger.charge(who, 40)
    charge.settle(99)
    ledger.charge(who, 1).settle(1)
    assert 60 < refused(ledger, who).retry_after_s <= 61.1
    clock.now += 62
    ledger.charge(who, 1)


def test_a_charge_settles_once(ledger):
    who = principal(("tokens", 100, 60))
    charge = ledger.charge(who, 40)
    charge.settle(10)
    charge.settle(10)
    assert ledger.used(who)[0][1] == 10


def test_requests_at_the_same_time_cannot_all_spend_what_is_left(ledger):
    who = principal(("tokens", 1000, 60))
    ledger.charge(who, 0).settle(900)
    running = [ledger.charge(who, 60)]
    for _ in range(50):
        assert refused(ledger, who, 60).retry_after_s == 2
    running.append(ledger.charge(who, 40))
    for charge in running:
        charge.settle(50)
    assert ledger.used(who)[0][1] == 1000


def test_a_request_larger_than_what_is_left_may_be_the_last_one(ledger):
    who = principal(("tokens", 100, 60))
    ledger.charge(who, 5000).settle(5000)
    refused(ledger, who, 1)


def test_the_tightest_limit_counts(ledger, clock):
    who = principal(("requests", 100, 60), ("requests", 2, 3600))
    ledger.charge(who, 0)
    ledger.charge(who, 0)
    error = refused(ledger, who)
    assert "2 requests per hour" in error.message
    assert error.retry_after_s > 3000


def test_keys_have_windows_of_their_own_and_no_limit_is_none(ledger):
    for name in ("ada", "bob"):
        ledger.charge(principal(("requests", 1, 60), name=name), 0)
    for _ in range(100):
        ledger.charge(principal(), 10**9).settle(10**9)


def test_what_was_counted_outlives_a_change_of_the_limit_and_goes_with_the_key(ledger):
    ledger.charge(principal(("tokens", 100, 60)), 0).settle(50)
    smaller = principal(("tokens", 50, 60))
    refused(ledger, smaller)
    ledger.forget_others([principal(name="bob")])
    ledger.charge(smaller, 0)


@given(
    events=st.lists(st.tuples(st.floats(0, 40), st.integers(0, 50)), max_size=40),
    limit=st.integers(1, 200),
)
def test_a_window_never_forgets_too_early_and_tells_when_it_will(events, limit):
    window, now, history = Window(60), 500.0, []
    for pause, amount in events:
        now += pause
        window.add(now, amount)
        history.append((now, amount))
        exact = sum(amount for when, amount in history if when > now - 60)
        coarse = sum(amount for when, amount in history if when > now - 62)
        assert exact <= window.used(now) <= coarse
    wait_s = window.seconds_until_below(now, limit)
    assert (wait_s == 0) == (window.used(now) < limit)
    if wait_s:
        assert window.used(now + wait_s + 0.001) < limit
