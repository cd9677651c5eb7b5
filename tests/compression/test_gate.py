"""The gate: how often it errs, what it says of slices, and what a torn model gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipway import trained
from slipway.compression import engine, gate
from slipway.errors import ModelError
from slipway.params import CompressParams
from slipway.workloads.ranker.export import Export
from slipway.workloads.ranker.params import RankerParams
from tests.ranker import data

LIMITS = CompressParams(max_drop=0.02, confidence=0.95)


def pairs(rng: np.random.Generator, count: int, lost: float, won: float) -> tuple[gate.Floats, gate.Floats]:
    """0/1 outcomes of two models, of which the first is right in 80 %; shares of all that the second loses and wins."""
    drawn = rng.random(count)
    full = (drawn < 0.8).astype(float)
    ours = ((drawn >= lost) & (drawn < 0.8) | (drawn >= 1 - won)).astype(float)
    return full, ours


@pytest.mark.parametrize("count", [200, 2000])
def test_a_model_that_loses_just_too_much_passes_as_seldom_as_the_confidence_says(count: int) -> None:
    rng = np.random.default_rng(0)
    lost, won = 0.8 * 0.05 + 0.03, 0.03  # a relative drop of 5 %
    tried = [gate.drop(*pairs(rng, count, lost, won), most=0.05, confidence=0.95).verdict for _ in range(2000)]
    assert 0.03 < tried.count("kept") / len(tried) < 0.065
    assert tried.count("lost") / len(tried) < 0.065


def test_a_model_that_loses_nothing_passes_once_there_are_samples_enough() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for count in (50, 500, 5000):
        tried = [gate.drop(*pairs(rng, count, 0.01, 0.01), most=0.02, confidence=0.95).verdict for _ in range(300)]
        shares.append(tried.count("kept") / len(tried))
    assert shares[0] < 0.1
    assert shares[2] > 0.99
    assert shares == sorted(shares)


def test_values_between_0_and_1_are_judged_as_seldom_wrong() -> None:
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(1000):
        full = np.where(rng.random(1000) < 0.3, rng.uniform(0.3, 1, 1000), 0.0)
        ours = np.where(rng.random(1000) < 0.03, 0.0, full)  # loses 3 % of the mean
        wrong += gate.drop(full, ours, most=0.03, confidence=0.95).verdict == "kept"
    assert wrong / 1000 < 0.065


def test_a_few_samples_on_which_both_agree_prove_nothing() -> None:
    same = np.ones(20)
    assert gate.drop(same, same, most=0.02, confidence=0.95).verdict == "open"
    assert gate.drop(np.ones(500), np.ones(500), most=0.02, confidence=0.95).verdict == "kept"
    none = np.zeros(30)
    assert gate.drop(none, none, most=0.02, confidence=0.95).verdict == "open"


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=60), st.floats(0.5, 0.99))
def test_bounds_are_in_order_and_widen_with_the_confidence(
    values: list[tuple[float, float]], confidence: float
) -> None:
    full, ours = np.array(values).T
    low, high = gate.bounds(full, ours, confidence)
    wide_low, wide_high = gate.bounds(full, ours, confidence / 2 + 0.5)
    value = 1 - ours.mean() / full.mean() if full.mean() > 1e-3 else None
    if low is not None and wide_low is not None:
        assert wide_low <= low + 1e-9
        assert value is None or low <= value + 1e-9
    if high is not None and wide_high is not None:
        assert high <= wide_high + 1e-9
        assert value is None or value <= high + 1e-9


def test_a_variant_that_loses_in_one_slice_names_it_and_does_not_pass() -> None:
    rng = np.random.default_rng(2)
    full, ours = pairs(rng, 40_000, 0.0, 0.0)
    shirts = np.arange(40_000) % 100 == 0
    ours[shirts] *= rng.random(400) < 0.8
    quality = gate.judge(full, ours, {"shirt": shirts, "rest": ~shirts, "empty": shirts & ~shirts}, LIMITS)
    assert quality.overall.verdict == "kept"
    assert {name: each.verdict for name, each in quality.slices.items()} == {"shirt": "lost", "rest": "kept"}
    (reason,) = quality.reasons
    assert "in the slice 'shirt' (400 samples), compress.max_drop allows 2.0%" in reason


def test_a_slice_too_small_to_judge_is_open_and_fails_nothing() -> None:
    full, ours = pairs(np.random.default_rng(3), 5000, 0.0, 0.0)
    quality = gate.judge(full, ours, {"rare": np.arange(5000) < 8}, LIMITS)
    assert quality.slices["rare"].verdict == "open"
    assert quality.reasons == ()


def test_too_few_samples_are_no_pass_and_the_reason_says_so() -> None:
    full, ours = pairs(np.random.default_rng(4), 60, 0.0, 0.0)
    (reason,) = gate.judge(full, ours, {}, LIMITS).reasons
    assert "may lose" in reason
    assert "60 samples" in reason


def test_other_answers_are_refused_even_if_they_are_as_good() -> None:
    full, ours = pairs(np.random.default_rng(5), 5000, 0.0, 0.0)
    (reason,) = gate.judge(full, ours, {}, LIMITS, overlap=0.5).reasons
    assert "shares 50.0% of the ten best answers, compress.min_overlap" in reason


def test_a_model_of_which_half_is_missing_is_named_and_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"fp32\.onnx"):
        engine.load(b"half a model", "fp32.onnx")
    folder = data.write(tmp_path / "data", [[1, 2, 3, 4]])
    weights, place = {"item.weight": np.zeros((9, 8), np.float32)}, tmp_path / "trained"
    trained.write(place, "llm", weights, {})
    with pytest.raises(ModelError, match="a model of the workload llm, not ranker"):
        Export(folder, place)
    trained.write(place, "ranker", weights, RankerParams(width=8).model_dump())
    with pytest.raises(ModelError, match="made from other data"):
        Export(folder, place)
    (place / trained.WEIGHTS).write_bytes((place / trained.WEIGHTS).read_bytes()[:100])
    with pytest.raises(ModelError, match=r"weights\.npz: torn"):
        Export(folder, place)
