"""What keeps a release whole: one at a time, traffic moved only by who knows where it is, a hand-over between steps.

Two locks, held by the kernel, so that a killed holder lets go. A step holds `release` all along, and a second one is
refused. Whoever moves traffic holds `routing` for that moment: a rollback, which nobody may refuse, goes between two
moves of a canary, and the canary finds out before it makes the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slipway import artifacts, locks
from slipway.errors import CanaryRejectedError, DataError, PlatformError, TransientError
from slipway.platforms.base import Platform, Routing
from slipway.release import history

log = logging.getLogger(__name__)


@contextmanager
def alone(step: str) -> Iterator[None]:
    """Be the only step of a release on this service.

    Raises:
        TransientError: another one is at work.
    """
    with locks.tried("release", step) as holder:
        if holder is not None:
            raise TransientError(f"another release is at work ({holder}); try again when it is done")
        yield


def at_work() -> str:
    """Tell which step of a release runs now, such as "canary of version 4"; empty: none.

    It only looks: to try the lock would refuse it to a step that begins at this moment.
    """
    return (locks.holder("release") or "").rpartition(", process ")[0]


def move(platform: Platform, known: Routing, new: Routing) -> None:
    """Put `new` in force if `known` still is.

    Raises:
        CanaryRejectedError: somebody moved the traffic meanwhile, by a rollback for instance.
    """
    with locks.held("routing"):
        require(platform, known)
        platform.route(new)


def end_canary(platform: Platform, workload: str, only: str | None = None) -> str | None:
    """Give the champion all users; the canary that lost them, if there was one (and it was `only`)."""
    with locks.held("routing"):
        routing = platform.status().routing
        canary = routing.canary
        if canary is None or only not in (None, canary):
            return None
        platform.route(Routing(champion=routing.champion))
    history.append("end-canary", workload, canary, champion=routing.champion, weight=routing.canary_weight)
    log.info("the canary lost its users version=%s champion=%s", canary, routing.champion)
    return canary


def require(platform: Platform, known: Routing) -> None:
    """See that `known` is still in force.

    Raises:
        CanaryRejectedError: somebody moved the traffic meanwhile.
    """
    now = platform.status().routing
    if now != known:
        raise CanaryRejectedError(f"the traffic was moved meanwhile, from {known} to {now}; it is left there")


@dataclass(frozen=True)
class Release:
    """What `deploy` brought up."""

    version: str
    champion: str | None
    """The champion then; None in a first release."""


def deployed(reports: Path) -> Release:
    """Read which version this run releases, from the report of its deploy.

    Raises:
        DataError: no deploy ended well in this workspace.
    """
    path = reports / "deploy.json"
    report = artifacts.read_json(path)
    if report.get("status") != "done":
        raise DataError(f"{path}: this deploy failed; run `python -m tasks.deploy` again")
    return Release(report["version"], report["champion"])


def candidate_routing(platform: Platform, version: str) -> Routing:
    """Give the routing in force, in which `version` is the canary or already the champion.

    Raises:
        PlatformError: it is neither, after a rollback for instance.
    """
    routing = platform.status().routing
    if version not in (routing.canary, routing.champion):
        raise PlatformError(f"version {version} is not in the service ({routing}); run `python -m tasks.deploy` again")
    return routing
