"""What is told of a run: where its time goes, its figures, and what stops it."""

from __future__ import annotations

import time

import pytest

from slipway.training import watch


def test_time_inside_of_an_inner_part_counts_once() -> None:
    before, began = watch.spent(), time.perf_counter()
    with watch.part("backward"):
        time.sleep(0.02)
        for _ in range(2):
            with watch.part("communication"):
                time.sleep(0.05)
    whole = time.perf_counter() - began
    took = {name: seconds - before[name] for name, seconds in watch.spent().items()}
    assert took["communication"] >= 0.1
    assert took["backward"] >= 0.02
    assert took["backward"] + took["communication"] <= whole + 1e-6, "some of it counts twice"
    assert took["forward"] == 0.0


def wait_and_fail() -> None:
    time.sleep(0.05)
    raise ValueError("inside")


def test_a_part_that_raises_is_closed() -> None:
    before, began = watch.spent(), time.perf_counter()
    with watch.part("validation"):
        with pytest.raises(ValueError, match="inside"), watch.part("data"), watch.part("forward"):
            wait_and_fail()
        with watch.part("optimizer"):
            pass
    whole = time.perf_counter() - began
    took = {name: seconds - before[name] for name, seconds in watch.spent().items()}
    assert took["forward"] >= 0.05
    assert took["optimizer"] > 0
    assert sum(took.values()) <= whole + 1e-6, "some of it counts twice: a part is still open"


def test_a_part_that_is_not_known_is_refused() -> None:
    with pytest.raises(KeyError, match="lunch"):
        watch.part("lunch")
