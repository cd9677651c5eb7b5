"""Who trains what of an epoch: each micro-batch once, whoever comes and goes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipway.training import order


@given(count=st.integers(1, 200), lives=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)), max_size=5))
def test_a_micro_batch_is_trained_once_however_often_the_number_of_processes_changes(
    count: int, lives: list[tuple[int, int]]
) -> None:
    """Each life is a number of processes and the steps that they do before they are killed; the last one ends."""
    trained: list[int] = []
    seen = 0
    for ranks, steps in [*lives, (2, count)]:
        plans = [order.turns(count, seen, rank, ranks) for rank in range(ranks)]
        for together in list(zip(*plans, strict=True))[:steps]:
            working = [turn for turn in together if turn.weight]
            trained += [turn.index for turn in working]
            assert sum(turn.weight for turn in together) == pytest.approx(ranks)
            assert len({turn.weight for turn in working}) == 1, "micro-batches of one step count differently"
            assert all(0 <= turn.index < count for turn in together)
            (seen,) = {turn.seen for turn in together}
    assert sorted(trained) == list(range(count))
    assert seen == count
