"""Hurt the candidate under load and see that users do not notice: one replica is killed, another one is stalled.

Reads reports/deploy.json; writes reports/chaos.json. Held-out users are replayed as traffic. Acts on the candidate's
replicas alone and heals them, also when it is interrupted; the verdict is left to the rollback, which comes next when
this step fails.
"""

from __future__ import annotations

import logging
from dataclasses import asdict

from slipway import platforms, stage
from slipway.errors import ChaosError
from slipway.faults.experiment import experiment, ready_replicas
from slipway.params import Params
from slipway.platforms.base import Fault
from slipway.release import history, replay, state
from slipway.stage import Report

log = logging.getLogger(__name__)


def run(params: Params, report: Report) -> None:
    """Run every experiment, or raise ChaosError after the first whose fault users noticed."""
    version = state.deployed(report.path.parent).version
    platform = platforms.connect(params)
    with state.alone(f"chaos on version {version}"):
        report["version"] = version
        if state.candidate_routing(platform, version).champion == version:
            report["skipped"] = "it is the champion already"
            return
        path, samples = replay.samples(params.workload, version)
        report["experiments"] = findings = []
        with replay.Replay(platform.inner_url, path, samples, params.chaos.rate_rps) as traffic:
            for number, fault in enumerate(Fault):
                replicas = ready_replicas(platform, version)
                target = replicas[number % len(replicas)]
                finding = experiment(platform, target, fault, traffic, params.chaos)
                findings.append(asdict(finding))
                log.info(
                    "fault=%s replica=%s recovery_s=%s %s", fault, target.name, finding.recovery_s, finding.figures
                )
                history.append("chaos", params.workload, version, fault=fault, broken=finding.broken)
                if finding.broken:
                    raise ChaosError(f"users noticed {fault} of {target.name}: {'; '.join(finding.broken)}")


if __name__ == "__main__":
    stage.main(run)
