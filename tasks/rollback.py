"""Go back: a canary in progress loses its users and ends; without one, the champion gives way to the version before it.

    python -m tasks.rollback [--to VERSION]

Needs the platform alone: Airflow and MLflow may be down, and no release in progress can refuse it. Run again it does
nothing more. Conf: to, an alias or a number; only_canary, true for the last step of a release, which ends what its own
deploy (reports/deploy.json) brought up and never touches the champion. Writes reports/rollback.json.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from slipway import artifacts, locks, platforms, stage, tracking
from slipway.errors import DataError, ParamsError, SlipwayError
from slipway.params import Params
from slipway.platforms.base import Platform, Routing
from slipway.release import history, state
from slipway.stage import Report

log = logging.getLogger(__name__)


def run(params: Params, report: Report) -> None:
    """Roll back what there is to roll back."""
    conf = stage.conf()
    to, only_canary = conf.get("to"), conf.get("only_canary", False)
    if not (to is None or isinstance(to, str)) or not isinstance(only_canary, bool) or (to and only_canary):
        raise ParamsError(f"conf: give either to, a version as text, or only_canary, true or false; got {conf}")
    platform, began = platforms.connect(params), time.monotonic()
    if only_canary:
        own = _deployed_here(report.path.parent)
        report["canary"] = own and state.end_canary(platform, params.workload, own)
        if own and own != platform.status().routing.champion:
            platform.remove(own)
            report["aliases"] = _withdraw(params.workload, own)
        return
    canary = report["canary"] = state.end_canary(platform, params.workload)
    report["seconds_to_route"] = round(time.monotonic() - began, 3)
    if to or not canary:
        replaced = _replace_champion(platform, params, to)
        report["seconds_to_route"] = round(time.monotonic() - began, 3)
        report["replaced"] = replaced
        if replaced:
            platform.remove(replaced)
    if canary and canary != platform.status().routing.champion:
        platform.remove(canary)
    report["champion"] = champion = platform.status().routing.champion
    report["aliases"] = _name_versions(params.workload, champion)


def _deployed_here(reports: Path) -> str | None:
    """Give the version that this run's deploy brought up; None if it got that far never."""
    try:
        version = artifacts.read_json(reports / "deploy.json").get("version")
    except DataError:
        return None
    return str(version) if version else None


def _withdraw(workload: str, version: str) -> bool:
    """Take the alias `candidate` from a version that its release refused, so that the next does not try it again."""
    try:
        if tracking.alias(workload, "candidate") == version:
            tracking.set_alias(workload, "candidate", None)
    except SlipwayError as error:
        log.warning("the refused version %s keeps the alias candidate: %s", version, error)
        return False
    return True


def _replace_champion(platform: Platform, params: Params, to: str | None) -> str | None:
    """Send all users to `to`, or to the version before the champion; the champion that lost them, if any did."""
    workload = params.workload
    target = tracking.resolve(workload, to) if to else history.previous(workload)
    replaced = platform.status().routing.champion
    if target is None or target == replaced:
        log.info("nothing to roll back to: champion=%s", replaced)
        if target and not to:  # a rollback was killed between route and history
            history.append("rollback", workload, target, rolled_back=None)
        return None
    if not any(replica.ready for replica in platform.status().replicas.get(target, ())):
        log.info("bringing up a version that was drained version=%s", target)
        platform.deploy(workload, target, params.deploy.replicas, params.deploy.ready_timeout_s)
    with locks.held("routing"):
        platform.route(Routing(champion=target))
    # The history last: killed in between, the next call finds the version before it in place and has only to write.
    history.append("rollback", workload, target, rolled_back=replaced)
    log.info("rolled back from=%s to=%s", replaced, target)
    return replaced


def _name_versions(workload: str, champion: str | None) -> bool:
    """Let the registry's aliases follow, if it can be reached: the users are served already."""
    try:
        history.name_versions(workload, champion, history.previous(workload))
    except SlipwayError as error:
        log.warning("the aliases in the registry stay behind until a rollback or promotion finds it: %s", error)
        return False
    return True


if __name__ == "__main__":
    stage.main(run, takes={"to": "version to go back to: an alias or a number (default: the one before the champion)"})
