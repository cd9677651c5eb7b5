"""The search for the highest rate that a service bears."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load import Seen
from benchmarks.serving.case import CLOSE, Search

N = 200


def seen(slow: int = 0, failed: int = 0) -> Seen:
    """Requests of which some came late and some came not at all."""
    latency_s, status = np.full(N, 0.01), np.full(N, 200)
    latency_s[:slow] = 0.2
    status[N - failed :] = 504
    return Seen(np.arange(N) / 100, np.zeros(N), latency_s, status)


@given(limit_rps=st.floats(30, 20_000))
def test_it_ends_within_a_tenth_under_the_limit(limit_rps: float) -> None:
    search, tries = Search(), 0
    while not search.over:
        search.note(seen() if search.rate_rps <= limit_rps else seen(failed=1))
        tries += 1
    assert limit_rps / CLOSE <= search.low_rps <= limit_rps
    assert tries < 40


@pytest.mark.parametrize(("one", "good"), [(seen(slow=2), True), (seen(slow=3), False), (seen(failed=1), False)])
def test_one_in_a_hundred_may_be_late_and_none_may_fail(one: Seen, good: bool) -> None:
    search = Search()
    search.note(one)
    assert (search.low_rps > 0) is good


def test_a_rate_is_too_high_when_it_is_missed_twice() -> None:
    search = Search()
    search.note(seen(failed=1))
    first = search.rate_rps
    search.note(seen())
    assert search.low_rps == first
    for _ in range(2):
        search.note(seen(failed=1))
    assert search.high_rps == 2 * first
