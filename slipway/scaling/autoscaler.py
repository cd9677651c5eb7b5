"""What the HorizontalPodAutoscaler is in a cluster: looks at the champion, decides, and lets the platform do it.

A canary is left alone, for it is judged against the champion with the replicas that it has; and while there is one, no
replica of the champion is taken away, which may need all of them again in a second.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from slipway.platforms.base import Platform
from slipway.prometheus import Prometheus
from slipway.scaling.algorithm import Decision, Memory, Reading, decide
from slipway.scaling.observation import Serving, observe
from slipway.scaling.policy import Policy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    """What one look found, and what came of it."""

    serving: Serving
    readings: Sequence[Reading]
    decision: Decision


class Autoscaler:
    """Scales the champion by a policy.

    Args:
        policy: what it follows.
        platform: where the replicas are.
        prometheus: where the metrics are.
        threads: processors that a replica requests.
        ready_timeout_s: longest wait for a new replica.
        clock: moments, s.
    """

    def __init__(
        self,
        policy: Policy,
        platform: Platform,
        prometheus: Prometheus,
        threads: int,
        ready_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy, self._platform, self._prometheus = policy, platform, prometheus
        self._threads, self._ready_timeout_s, self._clock = threads, ready_timeout_s, clock
        self._memories: Mapping[str, Memory] = {}

    def look(self) -> Look | None:
        """Decide once, and scale if there is need; None: nobody serves.

        Raises:
            PlatformError: the new replicas did not become ready; none of them stays, and the next look tries again.
        """
        status = self._platform.status()
        version = status.routing.champion
        if version is None or not status.replicas.get(version):
            return None
        serving = Serving(version, status.wanted[version], status.replicas[version], self._threads)
        readings = observe(self._policy, serving, self._prometheus)
        memory = self._memories.get(version, Memory())
        decision, memory = decide(self._policy, serving.wanted, readings, memory, self._clock())
        if decision.replicas < serving.wanted and status.routing.canary is not None:
            decision = Decision(serving.wanted, f"{decision.reason}; none is taken away beside a canary")
        self._memories = {version: memory}
        if decision.replicas != serving.wanted:
            self._scale(serving, decision, memory)
        return Look(serving, readings, decision)

    def _scale(self, serving: Serving, decision: Decision, memory: Memory) -> None:
        began = self._clock()
        self._platform.scale(serving.version, decision.replicas, self._ready_timeout_s)
        now = self._clock()
        self._memories = {serving.version: memory.changed(now, decision.replicas - serving.wanted)}
        log.info(
            "scaled version=%s replicas=%d->%d seconds=%.1f: %s",
            *(serving.version, serving.wanted, decision.replicas, now - began, decision.reason),
        )
