"""Laws of the verdict, and how often it is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.verdicts import CASES, rolled_back
from slipway.params import CanaryParams, SloParams
from slipway.release.analysis import Histogram, Limits, Share, Track, Verdict, Window, evidence, judge

LIMITS = Limits(CanaryParams(), SloParams())
BOUNDS_MS = (2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, float("inf"))


@st.composite
def tracks(draw: st.DrawFn) -> Track:
    counts = tuple(draw(st.lists(st.integers(0, 300), min_size=8, max_size=8)))
    requests, feedbacks = sum(counts), draw(st.integers(0, 1000))
    attempts = requests + draw(st.integers(0, 100))
    return Track(
        requests=requests,
        failed=draw(st.integers(0, min(requests, 20))),
        attempts=attempts,
        errors=draw(st.integers(0, min(attempts, 20))),
        latency=Histogram(BOUNDS_MS, counts),
        feedbacks=feedbacks,
        hits=draw(st.integers(0, feedbacks)),
    )


windows = st.builds(Window, tracks(), st.none() | tracks())
RANK = {Verdict.ROLLBACK: 0, Verdict.HOLD: 1, Verdict.ADVANCE: 2}


def rank(canary: Track, window: Window) -> int:
    return RANK[judge(replace(window, canary=canary), LIMITS).verdict]


def steady(requests: int, errors: int = 0, hit_ratio: float = 0.3, ms: float = 4.0) -> Track:
    counts = tuple(requests if bound == min(b for b in BOUNDS_MS if b >= ms) else 0 for bound in BOUNDS_MS)
    latency = Histogram(BOUNDS_MS, counts)
    return Track(requests, 0, requests, errors, latency, requests, round(requests * hit_ratio))


@given(window=windows, bucket=st.integers(0, 6), share=st.floats(0, 1))
def test_a_slower_canary_is_never_judged_better(window: Window, bucket: int, share: float) -> None:
    counts = list(window.canary.latency.counts)
    moved = round(share * counts[bucket])
    counts[bucket] -= moved
    counts[bucket + 1] += moved
    slower = replace(window.canary, latency=Histogram(BOUNDS_MS, tuple(counts)))
    assert rank(slower, window) <= rank(window.canary, window)


@given(window=windows, more=st.integers(0, 50))
def test_more_errors_are_never_judged_better(window: Window, more: int) -> None:
    canary = window.canary
    errors = min(canary.attempts, canary.errors + more)
    failed = min(canary.requests, canary.failed + more)
    assert rank(replace(canary, errors=errors), window) <= rank(canary, window)
    assert rank(replace(canary, failed=failed), window) <= rank(canary, window)


@given(window=windows, fewer=st.integers(0, 200))
def test_fewer_hits_are_never_judged_better(window: Window, fewer: int) -> None:
    worse = replace(window.canary, hits=max(0, window.canary.hits - fewer))
    assert rank(worse, window) <= rank(window.canary, window)


@given(track=tracks())
def test_a_canary_that_does_just_what_the_champion_does_is_not_rolled_back(track: Track) -> None:
    assert judge(Window(track, track), LIMITS).verdict is not Verdict.ROLLBACK


@given(part=st.integers(0, 500), rest=st.integers(0, 500), limit=st.floats(0.0001, 0.9999))
def test_evidence_is_an_expectation_of_at_most_one_at_the_limit(part: int, rest: int, limit: float) -> None:
    """One more event changes it by a factor whose mean, if the limit holds, is one: no look costs anything."""
    whole = part + rest
    now = evidence(Share(part, whole, limit))
    then = limit * evidence(Share(part + 1, whole + 1, limit)) + (1 - limit) * evidence(Share(part, whole + 1, limit))
    assert then == pytest.approx(now, rel=1e-6) or now > 1e290


def test_one_failed_request_among_fifty_is_no_rollback() -> None:
    window = Window(steady(50, errors=1), steady(950))
    assert judge(window, LIMITS).verdict is Verdict.ADVANCE


@pytest.mark.parametrize("champion", [steady(40), steady(190), steady(950), None])
def test_a_burst_of_errors_is_a_rollback_at_once(champion: Track | None) -> None:
    judgement = judge(Window(steady(10, errors=10), champion), LIMITS)
    assert judgement.verdict is Verdict.ROLLBACK
    assert "failed attempts: 10 of 10" in judgement.reasons[0]


def test_a_burst_is_seen_after_many_clean_requests() -> None:
    earlier = [Window(steady(5000), steady(5000))]
    assert judge(Window(steady(60, errors=40), steady(60)), LIMITS, earlier).verdict is Verdict.ROLLBACK


def test_failures_that_both_tracks_suffer_are_not_the_canarys_fault() -> None:
    assert judge(Window(steady(400, errors=40), steady(400, errors=40)), LIMITS).verdict is Verdict.ADVANCE


def test_few_requests_are_held_and_never_rolled_back() -> None:
    judgement = judge(Window(steady(49), steady(1000)), LIMITS)
    assert judgement.verdict is Verdict.HOLD
    assert judgement.reasons == ("49 requests on the canary, 50 are needed to judge it",)
    assert judge(Window(Track(), Track()), LIMITS).verdict is Verdict.HOLD


def test_a_slow_canary_is_refused_by_the_slo_without_a_champion() -> None:
    assert judge(Window(steady(100, ms=150.0)), LIMITS).verdict is Verdict.ROLLBACK
    assert judge(Window(steady(100, ms=90.0)), LIMITS).verdict is Verdict.ADVANCE


def test_a_ratio_of_latencies_counts_only_beyond_a_tenth_of_the_slo() -> None:
    champion = steady(1000, ms=1.0)
    assert judge(Window(steady(100, ms=9.0), champion), LIMITS).verdict is Verdict.ADVANCE
    assert judge(Window(steady(100, ms=19.0), champion), LIMITS).verdict is Verdict.ROLLBACK


def test_an_online_metric_that_collapsed_is_a_rollback_and_a_small_loss_is_none() -> None:
    champion = steady(1000)
    judgement = judge(Window(steady(100, hit_ratio=0.02), champion), LIMITS)
    assert judgement.verdict is Verdict.ROLLBACK
    assert "online metric: 0.020 of 100 feedbacks, champion 0.300 of 1000" in judgement.reasons[0]
    assert judge(Window(steady(100, hit_ratio=0.26), champion), LIMITS).verdict is Verdict.ADVANCE


def test_a_loss_of_the_metric_adds_up_over_the_steps() -> None:
    part = Window(steady(120, hit_ratio=0.14), steady(380))
    assert judge(part, LIMITS).verdict is Verdict.ADVANCE
    assert judge(part, LIMITS, [part] * 5).verdict is Verdict.ROLLBACK


@pytest.mark.parametrize(("case", "most"), [(name, 0.05) for name in list(CASES)[:5]])
def test_good_canaries_are_hardly_ever_rolled_back(case: str, most: float) -> None:
    share, _ = rolled_back(case, canaries=40)
    print(f"{case}: {share:.1%} of 40 rolled back")
    assert share <= most


@pytest.mark.parametrize("case", ["all attempts fail", "four times slower", "useless answers"])
def test_bad_canaries_are_rolled_back_in_the_first_steps(case: str) -> None:
    share, seconds = rolled_back(case, canaries=20)
    print(f"{case}: {share:.0%} of 20 rolled back, after {seconds:.0f} s in the median")
    assert share == 1.0
    assert seconds <= 15
