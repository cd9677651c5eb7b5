"""The algorithm against the cases that Kubernetes documents, and laws that hold whatever comes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipway.scaling import policy
from slipway.scaling.algorithm import Memory, Reading, by_replica, by_share, by_value, decide
from slipway.scaling.policy import Policy
from tests.conftest import ROOT

SHIPPED = policy.read(ROOT / "infra" / "kubernetes" / "hpa.yaml")


def rules(least: int = 1, most: int = 100, **behavior: Any) -> Policy:
    """The policy that is shipped, with other bounds and behaviour; what is left out is Kubernetes' own."""
    raw = SHIPPED.model_dump(by_alias=True, exclude_none=True)
    raw["spec"] |= {"minReplicas": least, "maxReplicas": most, "behavior": behavior}
    return Policy.model_validate(raw)


FREE = rules(
    scaleUp={"policies": [{"type": "Percent", "value": 10000, "periodSeconds": 1}]},
    scaleDown={"stabilizationWindowSeconds": 0},
)


def reading(replicas: int | None, name: str = "load") -> Reading:
    return Reading(name, None if replicas is None else 1.0, 1.0, replicas)


def after(rule: Policy, current: int, asked: int | None, memory: Memory | None = None, now: float = 0.0) -> int:
    return decide(rule, current, [reading(asked)], memory or Memory(), now)[0].replicas


def names(count: int) -> list[str]:
    return [f"r{n}" for n in range(count)]


@pytest.mark.parametrize(
    ("values", "target", "unready", "silent", "asked"),
    [
        ([200, 200], 100, 0, 0, 4),  # 200m where 100m is wanted: twice as many
        ([50, 50, 50, 50], 100, 0, 0, 2),  # 50m: half as many
        ([109, 109], 100, 0, 0, 2),  # within the tolerance
        ([90, 90, 90], 100, 0, 0, 3),
        ([111, 111], 100, 0, 0, 3),
        ([300, 500, 700], 300, 0, 0, 5),  # by the mean, rounded up
        ([0.3, 0.3, 0.3], 0.1, 0, 0, 9),  # binary fractions do not make it ten
        ([200, 200], 100, 0, 1, 4),  # out: who told nothing counts as 0
        ([200], 100, 0, 3, 4),  # ... which turned it round: nothing is done
        ([150, 150], 100, 0, 1, 3),  # ... or is within the tolerance
        ([20, 20], 100, 0, 1, 2),  # in: who told nothing counts as the target, 140 / 300
        ([10], 100, 0, 1, 2),  # 55 %, two of them
        ([95], 100, 0, 1, 2),
        ([200, 200], 100, 1, 0, 4),  # out: who is not ready yet counts as 0
        ([150, 150], 100, 2, 0, 4),
        ([300, 300], 100, 1, 1, 6),
        ([50, 50], 100, 1, 0, 1),  # in: who is not ready yet counts for nothing
    ],
)
def test_a_metric_of_each_replica(values: list[float], target: float, unready: int, silent: int, asked: int) -> None:
    everybody = names(len(values) + unready + silent)
    told = dict(zip(everybody, values, strict=False))
    late = everybody[len(values) : len(values) + unready]
    assert by_replica(len(everybody), target, told, everybody, late) == asked


def test_what_replicas_tell_that_are_not_ready_or_gone_is_not_heard() -> None:
    assert by_replica(2, 100, {"r0": 50, "r1": 50, "new": 900, "gone": 900}, ["r0", "r1", "new"], ["new"]) == 1
    assert by_replica(2, 100, {"gone": 900}, ["r0", "r1"]) is None
    assert by_replica(1, 100, {"new": 900}, ["new"], ["new"]) is None


@pytest.mark.parametrize(
    ("current", "ready", "value", "asked"),
    [(2, 2, 160, 4), (2, 2, 109, 2), (4, 4, 50, 2), (3, 1, 200, 2), (3, 3, 0, 0), (10, 10, 125, 13)],
)
def test_one_number_for_all(current: int, ready: int, value: float, asked: int) -> None:
    assert by_value(current, ready, 100, value) == asked


@pytest.mark.parametrize(("current", "value", "asked"), [(2, 400, 4), (2, 215, 2), (4, 150, 2), (3, 0, 0)])
def test_one_number_that_they_share(current: int, value: float, asked: int) -> None:
    assert by_share(current, 100, value) == asked


@pytest.mark.parametrize(
    ("asked", "decided"),
    [
        ((2, 5, 3), 5),  # the largest counts
        ((None, 5, 3), 5),  # out without one of them
        ((None, 3, 2), 4),  # in is skipped
        ((None, None, None), 4),
        ((1, 2, 3), 3),
    ],
)
def test_several_metrics(asked: tuple[int | None, ...], decided: int) -> None:
    found, _ = decide(FREE, 4, [reading(n, f"m{at}") for at, n in enumerate(asked)], Memory(), 0)
    assert found.replicas == decided


def test_the_reason_names_the_metric_that_counts_and_what_holds_it_back() -> None:
    found, _ = decide(SHIPPED, 2, [Reading("cpu", 2.8, 0.7, 8), reading(3)], Memory(), 0)
    assert found.reason == "cpu is 2.8 (target 0.7) and asks for 8; the policies allow 4"
    found, _ = decide(SHIPPED, 4, [reading(None, "p99"), reading(3)], Memory(), 0)
    assert found.reason == "no value of p99, so none is taken away"


def test_bounds_hold_before_any_metric_does() -> None:
    assert after(rules(2, 10), 1, None) == 2
    assert after(rules(2, 10), 12, 11) == 10
    assert after(FREE.at_most(3), 2, 9) == 3
    assert rules(2, 10).at_most(1).spec.max_replicas == 2, "never under the fewest"


@pytest.mark.parametrize(
    ("current", "decided"),
    [(1, 5), (3, 7), (10, 20), (40, 80)],  # Kubernetes' own: twice as many, or four more
)
def test_scaling_out_goes_as_far_as_the_most_generous_policy(current: int, decided: int) -> None:
    assert after(rules(), current, 100) == decided


def test_the_documented_policies_of_scaling_in() -> None:
    """Ten per cent a minute while there are more than 40, then four."""
    policies = [
        {"type": "Pods", "value": 4, "periodSeconds": 60},
        {"type": "Percent", "value": 10, "periodSeconds": 60},
    ]
    rule = rules(scaleDown={"stabilizationWindowSeconds": 0, "policies": policies})
    seen, current, memory = [], 80, Memory()
    for minute in range(7):
        found, memory = decide(rule, current, [reading(10)], memory, 60.0 * minute + 1)
        memory = memory.changed(60.0 * minute + 1, found.replicas - current)
        current = found.replicas
        seen.append(current)
    assert seen == [72, 64, 57, 51, 45, 40, 36]
    nearest = rules(scaleDown={"stabilizationWindowSeconds": 0, "policies": policies, "selectPolicy": "Min"})
    assert after(nearest, 80, 10) == 76
    assert after(rules(scaleDown={"stabilizationWindowSeconds": 0, "selectPolicy": "Disabled"}), 80, 10) == 80


def test_a_policy_counts_what_was_changed_within_its_time() -> None:
    rule = rules(scaleUp={"policies": [{"type": "Pods", "value": 4, "periodSeconds": 60}]})
    memory = Memory().changed(0, 4)
    assert after(rule, 8, 100, memory, now=59) == 8, "four were added already"
    assert after(rule, 8, 100, memory, now=61) == 12
    assert after(rule, 6, 100, memory.changed(10, -2), now=59) == 8, "two of them went again"


def test_scaling_in_takes_the_largest_proposal_of_the_window() -> None:
    rule = rules(scaleDown={"stabilizationWindowSeconds": 300})
    memory, current, seen = Memory(), 10, []
    for now, asked in [(0, 10), (100, 5), (200, 7), (299, 3), (301, 3), (402, 3), (501, 3)]:
        found, memory = decide(rule, current, [reading(asked)], memory, now)
        current = found.replicas
        seen.append(current)
    assert seen == [10, 10, 10, 10, 7, 7, 3]


def test_scaling_out_takes_the_smallest_proposal_of_its_window() -> None:
    rule = rules(scaleUp={"stabilizationWindowSeconds": 60})
    memory, current, seen = Memory(), 2, []
    for now, asked in [(0, 6), (30, 4), (61, 6), (91, 6)]:
        found, memory = decide(rule, current, [reading(asked)], memory, now)
        current = found.replicas
        seen.append(current)
    assert seen == [2, 2, 4, 6]


def test_what_was_before_the_start_counts_as_asked_for() -> None:
    assert after(SHIPPED, 8, 2) == 8


counts = st.integers(1, 40)
amounts = st.floats(0, 1000, allow_nan=False)
asked = st.one_of(st.none(), st.integers(0, 200))
moments = st.floats(0, 1000)
memories = st.builds(
    Memory,
    st.lists(st.tuples(moments, counts)).map(tuple),
    st.lists(st.tuples(moments, st.integers(-5, 5))).map(tuple),
)


@given(current=st.integers(0, 50), wanted=st.lists(asked, min_size=1), memory=memories, least=counts, more=counts)
def test_the_bounds_are_never_left(
    current: int, wanted: list[int | None], memory: Memory, least: int, more: int
) -> None:
    rule = rules(least, least + more)
    found, _ = decide(rule, current, [reading(n) for n in wanted], memory, 1000)
    assert least <= found.replicas <= least + more


@given(current=counts, known=st.lists(st.integers(0, 200)), memory=memories)
def test_nothing_is_taken_away_while_a_metric_is_lost(current: int, known: list[int], memory: Memory) -> None:
    readings = [reading(None), *(reading(n) for n in known)]
    assert decide(rules(), current, readings, memory, 1000)[0].replicas >= current


@given(current=counts, wanted=asked, memory=memories)
def test_it_goes_where_the_metrics_point_or_stays(current: int, wanted: int | None, memory: Memory) -> None:
    # What was asked for before may hold it back, but never turns it round.
    found = after(rules(), current, wanted, memory, 1000)
    assert (found - current) * ((current if wanted is None else wanted) - current) >= 0


@given(
    values=st.dictionaries(st.sampled_from(names(8)), amounts),
    unready=st.sets(st.sampled_from(names(8))),
    target=st.floats(1, 500),
    factor=st.floats(1, 10),
)
def test_more_load_never_asks_for_fewer(
    values: dict[str, float], unready: set[str], target: float, factor: float
) -> None:
    everybody = names(8)
    before = by_replica(8, target, values, everybody, unready)
    more = by_replica(8, target, {name: value * factor for name, value in values.items()}, everybody, unready)
    assert (before is None) == (more is None)
    if before is not None and more is not None:
        assert more >= before


@given(current=counts, ready=counts, target=st.floats(1, 500), value=amounts, factor=st.floats(1, 10))
def test_a_larger_number_never_asks_for_fewer_where_all_are_ready(
    current: int, ready: int, target: float, value: float, factor: float
) -> None:
    assert by_value(current, current, target, value * factor) >= by_value(current, current, target, value)
    assert by_share(current, target, value * factor) >= by_share(current, target, value)
    assert by_value(current, ready, target, target) == by_share(current, target, target * current) == current


@given(values=st.lists(amounts, min_size=1, max_size=8), target=st.floats(1, 500))
def test_the_number_asked_for_brings_the_mean_to_the_target(values: list[float], target: float) -> None:
    told = dict(zip(names(8), values, strict=False))
    found = by_replica(len(told), target, told, list(told))
    assert found is not None
    if found:
        assert sum(values) / found <= target * 1.1 + 1e-6, "what they do now, shared by so many, is no more than wanted"
