"""What the metrics of a policy are now, read from Prometheus: one reading for each, or none where it cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from slipway.platforms.base import Replica
from slipway.prometheus import Prometheus, Sample
from slipway.scaling.algorithm import Reading, by_replica, by_share, by_value
from slipway.scaling.policy import Identifier, Metric, Policy

PROCESSORS = Identifier(name="replica:processor:ratio5s")
"""Processors that a replica uses, recorded by infra/prometheus/rules."""


@dataclass(frozen=True)
class Serving:
    """What is scaled: the version that serves, as the platform sees it."""

    version: str
    wanted: int
    """Replicas that there should be so far."""
    replicas: Sequence[Replica]
    threads: int
    """Processors that a replica requests: one a thread of its engine."""

    @property
    def unready(self) -> set[str]:
        """Names of the replicas that do not answer yet, or no more."""
        return {replica.name for replica in self.replicas if not replica.ready}


def observe(policy: Policy, serving: Serving, prometheus: Prometheus) -> list[Reading]:
    """Read every metric of the policy."""
    return [
        reading(metric, serving, _ask(prometheus, query(metric, serving.version))) for metric in policy.spec.metrics
    ]


def query(metric: Metric, version: str) -> str:
    """PromQL for the series of a metric."""
    if metric.pods is not None:
        return metric.pods.metric.query(version=version)
    if metric.external is not None:
        return metric.external.metric.query()
    return PROCESSORS.query(version=version)


def reading(metric: Metric, serving: Serving, samples: Sequence[Sample]) -> Reading:
    """Make a reading of a metric's series.

    Args:
        metric: of the policy.
        serving: what is scaled.
        samples: the series, of a replica each with the label `replica`; of an external metric they are summed.
    """
    told = [sample for sample in samples if sample.value == sample.value]  # a quantile of nothing is not a number
    if metric.external is not None:
        target, value = metric.external.target, sum(sample.value for sample in told) if told else None
        name, ready = metric.external.metric.name, len(serving.replicas) - len(serving.unready)
        if value is None:
            asked = None
        elif target.type == "Value":
            asked = by_value(serving.wanted, ready, target.amount, value)
        else:
            asked = by_share(serving.wanted, target.amount, value)
        return Reading(name, value, target.amount, asked)
    if metric.pods is not None:
        name, target, unit = metric.pods.metric.name, metric.pods.target, 1.0
    else:
        assert metric.resource is not None
        name, target, unit = metric.resource.name, metric.resource.target, float(serving.threads)
    values = {sample.labels.get("replica", ""): sample.value / unit for sample in told}
    everybody = [replica.name for replica in serving.replicas]
    asked = by_replica(serving.wanted, target.amount, values, everybody, serving.unready)
    theirs = [values[replica] for replica in everybody if replica in values]
    return Reading(name, fmean(theirs) if theirs else None, target.amount, asked)


def _ask(prometheus: Prometheus, query: str) -> list[Sample]:
    """The series, or none while Prometheus is silent: what is not known takes no replica away."""
    try:
        return prometheus.now(query)
    except (OSError, ValueError, KeyError):
        return []
