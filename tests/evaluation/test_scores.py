"""Gates of a candidate, and its comparison with the champion."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slipway.evaluation import scores
from slipway.params import EvaluateParams

LIMITS = EvaluateParams(min_metric=0.1, max_champion_drop=0.05, max_latency_ms=10.0)


def failed(metric: float, champion: float | None, p99_ms: float) -> set[str]:
    values = np.full(100, metric)
    against = None if champion is None else scores.against("3", values, np.full(100, champion))
    return {gate.name for gate in scores.gates(LIMITS, metric, against, p99_ms) if not gate.passed}


def test_each_gate_fails_for_its_own_reason_alone() -> None:
    assert failed(0.2, None, 5.0) == set()
    assert failed(0.05, None, 5.0) == {"min_metric"}
    assert failed(0.2, 0.3, 5.0) == {"max_champion_drop"}
    assert failed(0.2, 0.205, 5.0) == set()
    assert failed(0.2, None, 11.0) == {"max_latency_ms"}


def test_two_models_are_compared_sample_by_sample() -> None:
    rng = np.random.default_rng(0)
    champion = rng.random(1000)
    found = scores.against("3", champion + 0.01, champion)
    assert found.low > 0.009  # every sample is better: paired, chance has no part in it
    shuffled = scores.against("3", rng.permutation(champion), champion)
    assert shuffled.low < 0 < shuffled.high


@given(hits=st.integers(0, 200), count=st.integers(1, 200))
def test_an_interval_holds_its_mean(hits: int, count: int) -> None:
    values = np.zeros(count)
    values[:hits] = 1.0
    low, high = scores.interval(values)
    assert 0.0 <= low <= values.mean() <= high <= 1.0
