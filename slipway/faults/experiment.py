"""One chaos experiment: a replica is hurt under live traffic, and what the users noticed is measured.

The steady state is what `limits` say: hardly a request fails, P99 stays bounded, and all replicas are ready again in
time. The blast radius is one replica of the candidate. The fault is healed however the experiment ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from slipway import commands
from slipway.errors import ChaosError
from slipway.params import ChaosParams
from slipway.platforms.base import Fault, Platform, Replica
from slipway.release.replay import Figures, Replay

POLL_S = 0.1
SETTLE_S = 2.5
"""The answers of the last requests have come by then: the gateway gives up its tries after 2.3 s."""
EXAMPLES = 3
STEADY_S = 5.0
"""Longest wait for the steady state before a fault."""


@dataclass(frozen=True)
class Finding:
    """What users noticed of one fault."""

    fault: Fault
    replica: str
    figures: Figures
    recovery_s: float | None
    """From the kill, or from the end of the stall, until all replicas were ready for good; None: they never were."""
    broken: tuple[str, ...]
    """Limits that were not kept, for people."""
    failures: tuple[str, ...]
    """What the first requests that failed got."""


def ready_replicas(platform: Platform, version: str) -> tuple[Replica, ...]:
    """Give the replicas of a version, all ready, healed of what an interrupted experiment left.

    Raises:
        ChaosError: the steady state does not hold: a replica is not ready.
    """
    for replica in platform.status().replicas.get(version, ()):
        platform.heal(replica)
    until = time.monotonic() + STEADY_S
    while True:
        replicas = platform.status().replicas.get(version, ())
        if replicas and all(replica.ready for replica in replicas):
            return replicas
        if time.monotonic() > until:
            raise ChaosError(f"version {version}: not all replicas are ready, so no fault is injected; see their logs")
        time.sleep(POLL_S)


def experiment(platform: Platform, target: Replica, fault: Fault, traffic: Replay, limits: ChaosParams) -> Finding:
    """Do `fault` to one replica and watch for `limits.duration_s`, longer until all of its version are ready again.

    A stall is healed after half of the time. The wait for recovery ends at `limits.max_recovery_s`.
    """
    count = len(platform.status().replicas[target.version])
    since_s, began = traffic.now_s(), time.monotonic()
    with commands.interruptible(), ExitStack() as afterwards:
        afterwards.callback(platform.heal, target)
        platform.inject(target, fault)
        if fault is Fault.STALL:
            time.sleep(limits.duration_s / 2)
            platform.heal(target)
        recovery_s = _recovery(platform, target.version, count, began + limits.duration_s, limits.max_recovery_s)
    until_s = traffic.now_s()
    time.sleep(SETTLE_S)
    figures = traffic.figures(since_s, until_s)
    failed = [
        f"{a.status} {a.error} after {a.latency_ms:.0f} ms"
        for a in traffic.answers.copy()
        if a.failed and since_s <= a.due_s < until_s
    ]
    broken = tuple(_broken(figures, recovery_s, limits))
    return Finding(fault, target.name, figures, recovery_s, broken, tuple(failed[:EXAMPLES]))


def _recovery(platform: Platform, version: str, count: int, end: float, longest_s: float) -> float | None:
    """Watch until `end`, longer while replicas are missing: seconds until all were ready and stayed so."""
    began = last_missing = time.monotonic()
    while True:
        replicas = platform.status().replicas.get(version, ())
        now, ready = time.monotonic(), len(replicas) >= count and all(replica.ready for replica in replicas)
        if not ready:
            last_missing = now
        if ready and now >= end:
            return round(last_missing - began, 3)
        if not ready and now - began > longest_s:
            return None
        time.sleep(POLL_S)


def _broken(figures: Figures, recovery_s: float | None, limits: ChaosParams) -> Iterator[str]:
    if figures.failed_ratio > limits.max_failed_ratio:
        yield f"{figures.failed} of {figures.requests} requests failed, allowed {limits.max_failed_ratio:.2%}"
    if figures.service_p99_ms > limits.max_p99_ms:  # a generator that lags is no fault of the service
        yield f"P99 {figures.service_p99_ms:.0f} ms, allowed {limits.max_p99_ms:g} ms"
    if recovery_s is None or recovery_s > limits.max_recovery_s:
        took = "not ready" if recovery_s is None else f"ready after {recovery_s:.1f} s"
        yield f"replicas {took}, allowed {limits.max_recovery_s:g} s"
