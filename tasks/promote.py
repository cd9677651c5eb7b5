"""Make the candidate the champion: all users in one atomic step, then the registry's aliases follow.

Reads reports/deploy.json; writes reports/promote.json. The version that it replaces becomes `previous` and stays warm
for `promote.warm_s`, so that a rollback takes a moment; then its replicas are drained, unless it serves again. Killed
anywhere and run again it ends the same. If it fails for good before users moved, or is told to end (SIGTERM, Ctrl-C),
it ends the canary, as no other step comes after it: the champion has all users. Where trying again may help the canary
stays; Airflow ends it after the last try.
"""

from __future__ import annotations

import logging
import time

from slipway import commands, locks, platforms, stage
from slipway.errors import CanaryRejectedError, SlipwayError, TransientError
from slipway.params import Params
from slipway.platforms.base import Platform, Routing
from slipway.progress import Progress
from slipway.release import history, state
from slipway.stage import Report

GIVE_BACK_S = 30.0
"""For so long a promotion that failed tries to give the champion all users."""

log = logging.getLogger(__name__)


def run(params: Params, report: Report) -> None:
    """Promote, keep the replaced version warm, and drain it."""
    version = state.deployed(report.path.parent).version
    platform = platforms.connect(params)
    with state.alone(f"promotion of version {version}"):
        routing = state.candidate_routing(platform, version)
        if routing.champion != version:
            began = time.monotonic()
            try:
                with commands.interruptible():
                    _move(platform, params.workload, routing, version)
            except (TransientError, CanaryRejectedError):  # it is tried again; somebody else moved the users
                raise
            except BaseException:
                if routing.champion is not None:
                    _give_back(platform, params.workload, version)
                raise
            report["seconds_to_route"] = round(time.monotonic() - began, 3)
        replaced = history.previous(params.workload)
        report["version"], report["replaced"] = version, replaced
        history.name_versions(params.workload, version, replaced)
    # The release is over: the next one, or a rollback, need not wait for the drain.
    if replaced is not None and platform.status().replicas.get(replaced):
        _wait(f"version {replaced} stays warm", params.promote.warm_s)
        report["drained"] = _drain(platform, replaced)


def _move(platform: Platform, workload: str, known: Routing, version: str) -> None:
    """Send all users to `version`, if the traffic still is as `known`, and write it down."""
    before = history.previous(workload)
    with locks.held("routing"):
        state.require(platform, known)
        # The history first: after a crash in between, a rollback finds `previous` serving and has nothing to do.
        history.append("promote", workload, version, replaced=known.champion)
        try:
            platform.route(Routing(champion=version))
        except BaseException:
            if known.champion is not None and platform.status().routing == known:
                # It did not happen: what a rollback goes back to stays what it was.
                history.append("rollback", workload, known.champion, rolled_back=version, replaced=before)
            raise


def _give_back(platform: Platform, workload: str, version: str) -> None:
    """End the canary, unless users have moved; what was in the way, as a gateway started anew, may last a moment."""
    deadline = time.monotonic() + GIVE_BACK_S
    while True:
        try:
            if platform.status().routing.champion == version:
                return
            state.end_canary(platform, workload, version)
            platform.remove(version)
        except (SlipwayError, OSError) as error:
            if time.monotonic() > deadline:
                log.error("the canary cannot be ended, run `python -m tasks.rollback`: %s", error)
                return
            time.sleep(0.5)
        else:
            return


def _wait(label: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    with Progress(label, total=seconds, unit="s") as progress:
        while (left_s := end - time.monotonic()) > 0:
            time.sleep(min(1.0, left_s))
            progress.advance(min(1.0, left_s))


def _drain(platform: Platform, version: str) -> bool:
    """Remove a version's replicas; False: it serves users again and is left alone."""
    routing = platform.status().routing
    if version in (routing.champion, routing.canary):
        log.info("not drained, it serves users again version=%s", version)
        return False
    # No lock, for which a rollback would have to wait: the platform refuses to remove what was routed to meanwhile.
    platform.remove(version)
    return True


if __name__ == "__main__":
    stage.main(run)
