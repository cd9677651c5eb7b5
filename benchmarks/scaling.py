"""From slow users to a ready replica, and back without losing one: `python -m benchmarks.scaling`, about three minutes.

A stack of its own with nginx, Prometheus, Alertmanager and the autoscaler, which follows infra/kubernetes/hpa.yaml but
for its times in and its least number: from one replica on, and in again after seconds, so that several surges fit into
the run; to two, for which there are cores here. One replica of a ranker with 200,000 items serves a rate that it can
bear. Then comes a third more than it can, users wait, and the clock runs: from the first request that took over 100 ms
to the alert `LatencyHigh` and to the second replica that the gateway asks, whichever metric called it. Between surges
a light load goes on while the second replica is taken away. Medians of the surges, with the worst.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import load, watch
from benchmarks.claims import Claim, tell
from slipway import loopback
from slipway.errors import PlatformError
from slipway.params import DeployParams
from slipway.platforms.base import Routing
from tests.platforms import stand
from tests.platforms.stand import Here
from tests.scaling import policies
from tests.serving import packages

COMMAND = "python -m benchmarks.scaling"
PROGRAMS = [*stand.SERVICE, "alertmanager", "autoscaler"]
ITEMS = 200_000  # so many that the engine takes the time, not the generator or nginx
ROUNDS, CALM_S, SURGE_S, IN_S = 5, 4.0, 15.0, 25.0
CALM, SURGE = 0.4, 1.3  # of what one replica can do
LIMIT_S, PROMISED_S = 0.1, 5.0


@dataclass
class Sight:
    """When what was seen first."""

    moments: dict[str, float] = field(default_factory=dict)

    def saw(self, what: str) -> None:
        """Remember the first time."""
        self.moments.setdefault(what, time.monotonic())


@dataclass(frozen=True)
class Surge:
    """What became of one."""

    alert_s: float
    """From the first slow request to the alert; infinite: it did not come."""
    ready_s: float
    """From the first slow request to the second ready replica."""
    before_ms: float
    """P99 from the first slow request to the second replica."""
    after_ms: float
    """P99 of the last five seconds."""
    failed: int
    requests: int


def main() -> None:
    """Bring the stack up, measure, tell."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        chosen = stand.params()
        policy = policies.quick(Path(name), least=1)
        chosen = chosen.model_copy(update={"deploy": DeployParams(replicas=1, autoscaling=str(policy))})
        with stand.running(Path(name) / "home", chosen, PROGRAMS) as up:
            stand.publish("1", package=packages.seal(Path(name) / "package", items=ITEMS, width=128))
            up.platform.deploy("ranker", "1", 1, 120)
            up.platform.route(Routing("1"))
            rows = measured(up)
    tell("Scaling", COMMAND, rows, options.json)


def requests() -> list[bytes]:
    """Users' requests, whole."""
    return [load.post("/v1/recommend", sample["request"]) for sample in stand.samples()]


def measured(up: Here) -> list[Claim]:
    """Some surges, and the way back after each."""
    address = ("127.0.0.1", up.params.stack.gateway_port)
    (replica,) = up.platform.status().replicas["1"]
    host, port = replica.address.split(":")
    most = load.closed_loop((host, int(port)), requests(), 16, 3.0)[200] / 3.0
    print(f"one replica at most: {most:.0f} requests/s", file=sys.stderr)
    time.sleep(10)  # until what that did to the metrics is past
    surges, back = [], []
    for number in range(ROUNDS):
        alone(up)
        surges.append(surge(up, address, most, number))
        print(f"surge: {surges[-1]}", file=sys.stderr)
        back.append(taken_away(address, most, number))
        print(f"back: {back[-1]}", file=sys.stderr)
    return claims(surges, back)


def alone(up: Here) -> None:
    """Wait until one replica serves, and no alert is left."""
    deadline = time.monotonic() + 90
    while len(watch.asked()) != 1 or firing(up):
        if time.monotonic() > deadline:
            raise PlatformError(
                f"{len(watch.asked())} replicas serve in the calm, alerts {firing(up)}; see autoscaler.log"
            )
        time.sleep(0.2)


def firing(up: Here) -> bool:
    """Whether the alert does."""
    with loopback.urlopen(f"{up.platform.prometheus_url}/api/v1/alerts", timeout=5) as answer:
        alerts: list[Any] = json.load(answer)["data"]["alerts"]
    return any(each["labels"]["alertname"] == "LatencyHigh" and each["state"] == "firing" for each in alerts)


@contextmanager
def watched(up: Here) -> Iterator[Sight]:
    """See alert and replica come, twenty times a second."""
    sight = Sight()

    def look() -> None:
        if "alert" not in sight.moments and firing(up):
            sight.saw("alert")
        if len(watch.asked()) > 1:
            sight.saw("ready")

    with watch.looking(look, 0.05):
        yield sight


def surge(up: Here, address: load.Address, most: float, seed: int) -> Surge:
    """A calm, then more than one replica can do."""
    calm = load.poisson(CALM * most, CALM_S, seed)
    due_s = np.concatenate([calm, CALM_S + load.poisson(SURGE * most, SURGE_S, seed + 100)])
    with watched(up) as sight:
        began = time.monotonic()
        seen = load.open_loop(address, requests(), due_s)
    slow = (seen.latency_s > LIMIT_S) & (seen.due_s >= CALM_S)
    answered_s = seen.due_s + np.where(np.isfinite(seen.latency_s), seen.latency_s, LIMIT_S)
    breach_s = float(np.min(answered_s[slow], initial=CALM_S + SURGE_S))
    came = {what: sight.moments.get(what, float("inf")) - began for what in ("alert", "ready")}
    before = (seen.due_s >= breach_s) & (seen.due_s < came["ready"])
    return Surge(
        came["alert"] - breach_s,
        came["ready"] - breach_s,
        _p99_ms(seen, before),
        _p99_ms(seen, seen.due_s > CALM_S + SURGE_S - 5),
        *(sum(n for status, n in seen.statuses.items() if status != 200), len(due_s)),
    )


def taken_away(address: load.Address, most: float, seed: int) -> tuple[int, int, bool]:
    """A light load until the second replica is gone: requests, failed ones, whether it is gone."""
    seen = load.open_loop(address, requests(), load.poisson(CALM / 2 * most, IN_S, seed + 200))
    return len(seen.due_s), len(seen.due_s) - seen.statuses.get(200, 0), len(watch.asked()) == 1


def _p99_ms(seen: load.Seen, chosen: Any) -> float:
    latency_s = seen.latency_s[chosen & (seen.status == 200)]
    return float(np.quantile(latency_s, 0.99, method="inverted_cdf")) * 1e3 if len(latency_s) else float("nan")


def claims(surges: list[Surge], back: list[tuple[int, int, bool]]) -> list[Claim]:
    """The table."""
    ready_s, alert_s = [each.ready_s for each in surges], [each.alert_s for each in surges]
    before, after = (statistics.median(each) for each in zip(*((s.before_ms, s.after_ms) for s in surges), strict=True))
    asked, lost = sum(each.requests for each in surges), sum(each.failed for each in surges)
    gone, failed = sum(requests for requests, _, _ in back), sum(failed for _, failed, _ in back)
    times = sum(done for _, _, done in back)
    return [
        Claim(
            *("first request over 100 ms → alert → another replica is asked", "under 5 s", "alert"),
            f"{_median(alert_s)} → {_median(ready_s)}",
            *(PROMISED_S / max(ready_s), max(ready_s) < PROMISED_S),
        ),
        Claim(
            *("P99 until then, and with it", "100 ms", f"{before:.0f} ms", f"{after:.0f} ms"),
            *(before / after, after < LIMIT_S * 1e3),
        ),
        Claim("requests refused in the surges (they could not make it)", "", "", f"{lost} of {asked}", 1.0, lost == 0),
        Claim(
            *("failed while the replica is taken away", "none", f"{times} times", f"{failed} of {gone}"),
            *(1.0, failed == 0 and times == len(back)),
        ),
    ]


def _median(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} s (at most {max(seconds):.1f})"


if __name__ == "__main__":
    main()
