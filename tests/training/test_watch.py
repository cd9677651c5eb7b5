"""What is told of a run: where its time goes, its figures, and what stops it."""

from __future__ import annotations

import time

import pytest

from slipway.training import watch


def test_time_inside_of_an_inner_part_counts_once() -> None:
    before = watch.spent()
    with watch.part("backward"):
        time.sleep(0.02)
        for _ in range(2):
            with watch.part("communication"):
                time.sleep(0.05)
    took = {name: seconds - before[name] for name, seconds in watch.spent().items()}
    assert 0.1 <= took["communication"] < 0.2
    assert 0.02 <= took["backward"] < 0.08
    assert took["forward"] == 0.0


def test_a_part_that_raises_is_closed() -> None:
    before = watch.spent()
    with pytest.raises(ValueError, match="inside"), watch.part("data"), watch.part("forward"):
        raise ValueError("inside")
    with watch.part("optimizer"):
        pass
    assert watch.spent()["data"] - before["data"] < 0.01
    assert watch.spent()["optimizer"] > before["optimizer"]


def test_a_part_that_is_not_known_is_refused() -> None:
    with pytest.raises(KeyError, match="lunch"):
        watch.part("lunch")
