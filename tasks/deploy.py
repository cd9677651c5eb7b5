"""Bring a registered version up beside the champion, and try every replica of it; no user is sent there yet.

Reads the registry and its own conf: version, an alias or a number (default candidate). Writes reports/deploy.json, from
which the later steps of the release know the version. Afterwards the version is the canary at weight 0; in a first
release, where nobody else serves, it gets the users.
"""

from __future__ import annotations

import http.client
import json
import logging

from slipway import platforms, stage, tracking
from slipway.errors import ParamsError, PlatformError
from slipway.params import Params
from slipway.platforms.base import Platform, Replica, Routing, Status
from slipway.release import history, replay, state
from slipway.stage import Report

SMOKE_REQUESTS = 20
SMOKE_TIMEOUT_S = 5.0

log = logging.getLogger(__name__)


def run(params: Params, report: Report) -> None:
    """Deploy, or raise PlatformError; a version that fails its trial is removed again."""
    version = tracking.resolve(params.workload, _reference())
    platform = platforms.connect(params)
    with state.alone(f"deploy of version {version}"):
        before = platform.status()
        routing = before.routing
        if routing.canary not in (None, version):
            raise PlatformError(
                f"version {routing.canary} is a canary at weight {routing.canary_weight:g}: let that release end, or "
                "end it with `python -m tasks.rollback`"
            )
        report["version"], report["champion"] = version, routing.champion
        _sweep(platform, before, {version, history.previous(params.workload)})
        path, samples = replay.samples(params.workload, version)
        limits = params.deploy
        count = limits.replicas
        if params.scales:  # whom it may replace was scaled by the load, which will be its own
            count = max(count, before.wanted.get(routing.champion or "", 0))
        log.info("deploying version=%s replicas=%d champion=%s", version, count, routing.champion)
        platform.deploy(params.workload, version, count, limits.ready_timeout_s)
        replicas = platform.status().replicas[version]
        try:
            tried = sum(smoke(replica, path, samples[:SMOKE_REQUESTS]) for replica in replicas)
        except PlatformError:
            if version not in (routing.champion, routing.canary):
                platform.remove(version)
            raise
        if routing.champion != version and routing.canary is None:
            first = routing.champion is None
            state.move(platform, routing, Routing(routing.champion, version, 1.0 if first else 0.0))
        report["replicas"] = [{"name": replica.name, "address": replica.address} for replica in replicas]
        report["smoke_requests"] = tried
        history.append("deploy", params.workload, version, champion=routing.champion, replicas=len(replicas))


def _reference() -> str:
    conf = stage.conf()
    reference = conf.get("version", "candidate")
    if not isinstance(reference, str) or not reference:
        raise ParamsError(f"conf: version must be an alias or a number as text, got {reference!r}")
    return reference


def _sweep(platform: Platform, found: Status, kept: set[str | None]) -> None:
    """Remove what a killed deploy or promotion of another version left."""
    for version in set(found.replicas) - {found.routing.champion, found.routing.canary} - kept:
        log.info("removing a version that nobody uses version=%s", version)
        platform.remove(version)


def smoke(replica: Replica, path: str, samples: list[replay.Sample]) -> int:
    """Ask one replica directly; the number of requests.

    Raises:
        PlatformError: an answer is not what users may be given; says which and why.
    """
    connection = http.client.HTTPConnection(replica.address, timeout=SMOKE_TIMEOUT_S)
    try:
        for sample in samples:
            connection.request("POST", path, json.dumps(sample["request"]), {"Content-Type": "application/json"})
            response = connection.getresponse()
            body, version = response.read(), response.headers.get("X-Slipway-Version")
            if response.status != 200 or version != replica.version:
                raise PlatformError(
                    f"replica {replica.name}: smoke request {sample['request']} got {response.status} from version "
                    f"{version}: {body[:200].decode(errors='replace')}"
                )
    except (OSError, http.client.HTTPException) as error:
        raise PlatformError(f"replica {replica.name}: no answer to a smoke request ({error!r}); see its log") from error
    finally:
        connection.close()
    return len(samples)


if __name__ == "__main__":
    stage.main(run, takes={"version": "what to deploy: an alias or a number (default: candidate)"})
