"""The order of an epoch over a large table: every window once, random, in memory that does not grow with the table."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from slipway.workloads.ranker.windows import GROUP, POOL, Ints, Order, Windows, windows

SIZE, RANKS, LENGTH = 64, 3, 4


def table(users: int) -> Ints:
    return np.concatenate([[0], np.cumsum(np.random.default_rng(users).integers(1, 14, size=users))])


@pytest.fixture(scope="module")
def large() -> Ints:
    return table(300_000)


def test_a_table_of_many_groups_gives_every_window_once(large: Ints) -> None:
    order = Order(Windows(large, LENGTH), SIZE, RANKS, (1, 2))
    begin, end = (np.concatenate(column) for column in zip(*(order[i] for i in range(len(order))), strict=True))
    assert order.total > 2 * GROUP, "the table is too small for this test"
    truth = windows(large, LENGTH)
    by_end = np.argsort(end)
    np.testing.assert_array_equal(end[by_end], np.sort(truth[1]))
    np.testing.assert_array_equal(begin[by_end], truth[0][np.argsort(truth[1])])
    middle = end[:GROUP] / large[-1]
    assert np.histogram(middle, bins=10, range=(0, 1))[0].min() > 0.05 * GROUP, "a group is not from the whole table"


def test_batches_are_found_by_their_index_alone(large: Ints) -> None:
    one, other = (Order(Windows(large, LENGTH), SIZE, RANKS, (1, 2)) for _ in range(2))
    for index in (len(one) - 1, 0, GROUP // SIZE + 5, 7):
        for mine, same in zip(one[index], other[index], strict=True):
            np.testing.assert_array_equal(mine, same)
    another = Order(Windows(large, LENGTH), SIZE, RANKS, (1, 3))
    assert not np.array_equal(one[0][0], another[0][0])
    with pytest.raises(IndexError):
        one[len(one)]


def test_a_step_of_any_group_holds_windows_of_like_length(large: Ints) -> None:
    order = Order(Windows(large, LENGTH), SIZE, RANKS, (1, 2))
    first = (GROUP // (POOL * RANKS * SIZE)) * POOL * RANKS  # the second group begins with this micro-batch
    spread = []
    for at in range(first, first + 30 * RANKS, RANKS):
        lengths = np.concatenate([np.subtract(*order[i][::-1]) for i in range(at, at + RANKS)])
        spread.append(lengths.max() - lengths.min())
    assert np.mean(spread) < 1


def test_memory_does_not_grow_with_the_table() -> None:
    peaks = []
    for users in (300_000, 1_200_000):
        offsets = table(users)
        tracemalloc.start()
        order = Order(Windows(offsets, LENGTH), SIZE, RANKS, (1, 2))
        for index in range(0, len(order), GROUP // SIZE // 2):
            order[index]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.15 * peaks[0], peaks
