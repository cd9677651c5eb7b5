"""Send the users to the canary step by step, judge both tracks every second, and end it at the first violated limit.

Held-out users are replayed as live traffic, with what they truly chose as feedback. Reads reports/deploy.json and
Prometheus; writes reports/canary.json: the figures of both tracks in every step, the verdict and its reasons. Killed
and run again it goes on from the weight in force. After a rejection the champion has all the traffic; the replicas of
the canary stay for a look until the rollback removes them.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from slipway import platforms, stage
from slipway.errors import CanaryRejectedError, TransientError
from slipway.params import Params
from slipway.platforms.base import Platform, Routing
from slipway.progress import Progress
from slipway.release import history, replay, state
from slipway.release.analysis import Judgement, Limits, Track, Verdict, Window, judge
from slipway.release.measure import PATIENCE_S, Meter, Prometheus
from slipway.stage import Report

POLL_S = 1.0

log = logging.getLogger(__name__)


def run(params: Params, report: Report) -> None:
    """Bring the canary through all steps, or raise CanaryRejectedError with the champion back at full traffic."""
    release = state.deployed(report.path.parent)
    platform = platforms.connect(params)
    with state.alone(f"canary of version {release.version}"):
        routing = state.candidate_routing(platform, release.version)
        report["workload"], report["version"], report["champion"] = params.workload, release.version, routing.champion
        if routing.champion == release.version:
            report["skipped"] = "it is the champion already"
            return
        path, samples = replay.samples(params.workload, release.version)
        traffic = replay.Replay(platform.inner_url, path, samples, params.canary.replay_rate_rps)
        try:
            with traffic:
                _Canary(platform, Limits(params.canary, params.slo), report).run(routing)
        finally:
            report["replayed"] = asdict(traffic.figures())
        history.append("canary", params.workload, release.version, verdict=Verdict.ADVANCE)


@dataclass
class _Canary:
    """One canary on its way up."""

    platform: Platform
    limits: Limits
    report: Report
    steps: list[dict[str, Any]] = field(default_factory=list)
    judged: list[Window] = field(default_factory=list)
    """What the steps that are over have counted."""
    looks: list[tuple[float, Judgement]] = field(default_factory=list)
    """Every judgement, and the moment of the look before it."""

    def run(self, routing: Routing) -> None:
        self.report["steps"] = self.steps
        prometheus = Prometheus(self.platform.prometheus_url)
        for weight in self._weights(routing):
            step = Routing(routing.champion, routing.canary, weight)
            state.move(self.platform, routing, step)
            routing = step
            self.steps.append({"weight": weight, "started": _now(), "holds": 0})
            self._await_scrape(routing, prometheus)
            judgement = self._settle(routing, Meter(prometheus))
            log.info("weight=%g verdict=%s: %s", weight, judgement.verdict, "; ".join(judgement.reasons))
            if judgement.verdict is not Verdict.ADVANCE:
                self._reject(routing, judgement)

    def _weights(self, routing: Routing) -> list[float]:
        """Steps from the weight in force on; a first release has nobody to share with."""
        if routing.champion is None:
            return [1.0]
        return [weight for weight in self.limits.canary.step_weights if weight >= routing.canary_weight]

    def _await_scrape(self, routing: Routing, prometheus: Prometheus) -> None:
        """Wait until Prometheus saw the weight: what it counts from then on is of this step."""
        until = time.monotonic() + PATIENCE_S
        while not prometheus.sees_weight(routing.canary_weight):
            state.require(self.platform, routing)
            if time.monotonic() > until:
                raise TransientError("Prometheus does not scrape the gateway; see `make status`, then try again")
            time.sleep(0.1)

    def _settle(self, routing: Routing, meter: Meter) -> Judgement:
        """Measure interval by interval, until judge() says more than HOLD."""
        interval_s = self.limits.canary.interval_s
        began = time.monotonic()
        with Progress(f"canary at weight {routing.canary_weight:g}", total=interval_s, unit="s") as progress:
            for hold in range(self.limits.canary.max_holds + 1):
                self.steps[-1]["holds"] = hold
                while True:
                    before, left_s = time.monotonic(), began + (hold + 1) * interval_s - time.monotonic()
                    time.sleep(max(0.0, min(POLL_S, left_s)))
                    window, judgement = self._look(routing, meter, before)
                    progress.advance(time.monotonic() - before, requests=window.canary.requests)
                    if judgement.verdict is Verdict.ROLLBACK:
                        return judgement
                    if left_s <= POLL_S:
                        break
                if judgement.verdict is Verdict.ADVANCE:
                    break
        self.judged.append(window)
        return judgement

    def _look(self, routing: Routing, meter: Meter, before: float) -> tuple[Window, Judgement]:
        state.require(self.platform, routing)
        window = meter.window(routing)
        judgement = judge(window, self.limits, self.judged)
        self.looks.append((before, judgement))
        self.steps[-1].update(
            ended=_now(),
            verdict=judgement.verdict,
            reasons=judgement.reasons,
            canary=_told(window.canary),
            champion=_told(window.champion) if window.champion else None,
        )
        return window, judgement

    def _reject(self, routing: Routing, judgement: Judgement) -> None:
        """Give the champion all the traffic; without one, nobody is served by what was found bad."""
        verdict_at = time.monotonic()
        back = Routing(routing.champion, routing.canary, 0.0) if routing.champion else Routing()
        state.move(self.platform, routing, back)
        zero_at = time.monotonic()
        self.report["reasons"] = judgement.reasons
        self.report["seconds_verdict_to_zero_traffic"] = round(zero_at - verdict_at, 3)
        if (first := self._first_bad(judgement)) is not None:
            self.report["seconds_first_bad_to_zero_traffic"] = round(zero_at - first, 3)
        reasons = "; ".join(judgement.reasons)
        workload, version, weight = self.report["workload"], self.report["version"], routing.canary_weight
        history.append("canary", workload, version, verdict=judgement.verdict, weight=weight, why=reasons)
        raise CanaryRejectedError(
            f"canary at weight {routing.canary_weight:g}: {judgement.verdict}: {reasons}; "
            f"{'the champion has' if routing.champion else 'nobody has'} all the traffic; see {self.report.path}"
        )

    def _first_bad(self, judgement: Judgement) -> float | None:
        """When the first bad answer came at the earliest: at the look before the one that saw it."""
        violated = {finding.limit for finding in judgement.findings if finding.violated}
        for before, then in self.looks:
            if any(finding.bad and finding.limit in violated for finding in then.findings):
                return before
        return None


def _told(track: Track) -> dict[str, Any]:
    """A track's figures as plain JSON; P99 is null where it lies beyond the last bucket."""
    p99_ms = track.latency.quantile(0.99)
    ratio = track.hits / track.feedbacks if track.feedbacks else None
    counts = {k: v for k, v in asdict(track).items() if k != "latency"}
    return {**counts, "p99_ms": p99_ms if p99_ms and math.isfinite(p99_ms) else None, "online_metric": ratio}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


if __name__ == "__main__":
    stage.main(run)
