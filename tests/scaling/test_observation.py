"""Readings of the shipped policy's metrics, from series as Prometheus gives them."""

from __future__ import annotations

import pytest

from slipway.platforms.base import Replica
from slipway.prometheus import Sample
from slipway.scaling import policy
from slipway.scaling.observation import Serving, query, reading
from tests.conftest import ROOT

CPU, QUEUE, P99 = policy.read(ROOT / "infra" / "kubernetes" / "hpa.yaml").spec.metrics


def serving(ready: int = 2, unready: int = 0, threads: int = 1) -> Serving:
    states = [True] * ready + [False] * unready
    replicas = [Replica(f"r{n}", "4", f"127.0.0.1:{n}", state) for n, state in enumerate(states)]
    return Serving("4", ready + unready, replicas, threads)


def series(*values: float) -> list[Sample]:
    return [Sample("", {"replica": f"r{n}", "version": "4"}, value) for n, value in enumerate(values)]


def test_replicas_are_asked_by_version_and_users_by_track() -> None:
    assert query(CPU, "4") == 'replica:processor:ratio5s{version="4"}'
    assert query(QUEUE, "4") == 'replica:queue_seconds:mean5s{version="4"}'
    assert query(P99, "4") == 'track:request_seconds:p99_5s{track="champion"}'


def test_processors_count_against_those_that_a_replica_requests() -> None:
    assert reading(CPU, serving(), series(1.4, 1.4)).replicas == 4
    found = reading(CPU, serving(threads=2), series(1.4, 1.4))
    assert (found.name, found.target, found.replicas) == ("cpu", 0.7, 2)
    assert found.value == pytest.approx(0.7)


def test_a_slow_service_asks_for_replicas_by_those_that_are_ready() -> None:
    assert reading(P99, serving(), [Sample("", {"track": "champion"}, 0.16)]).replicas == 4
    assert reading(P99, serving(2, 2), [Sample("", {"track": "champion"}, 0.16)]).replicas == 4
    assert reading(P99, serving(), [Sample("", {"track": "champion"}, 0.082)]).replicas == 2


@pytest.mark.parametrize("metric", [CPU, QUEUE, P99])
def test_what_is_not_told_or_not_a_number_is_no_reading(metric: policy.Metric) -> None:
    assert reading(metric, serving(), []).replicas is None
    assert reading(metric, serving(), series(float("nan"), float("nan"))).replicas is None


def test_other_versions_and_new_replicas_do_not_count() -> None:
    told = [*series(0.005, 0.005, 0.9), Sample("", {"replica": "elsewhere"}, 9.0)]
    found = reading(QUEUE, serving(2, 1), told)
    assert found.replicas == 1
