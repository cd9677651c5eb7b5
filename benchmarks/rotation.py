"""How fast a replica is there, and how fast a dead or stalled one is out: `python -m benchmarks.rotation`.

A stack of its own with nginx and two replicas of a tiny ranker, and 200 users' requests/s through the gateway, an open
loop, while one replica is killed with SIGKILL, or stalled with SIGSTOP for two seconds. What the gateway would ask is
read from it every 10 ms. A start counts from the request for one more replica to the first moment at which the gateway
asks it, supervisord, imports, golden check and warm-up included; it is also taken of a ranker of 50,000 items. Times
are the median and the worst of the rounds; the latencies of all rounds are one sample, and the generator's own lag,
which beside two replicas on two cores is no small part, is in them. Writes benchmarks/results/rotation.json. About 2
minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks import load, watch
from benchmarks.claims import Claim, tell
from slipway.platforms.base import Fault, Routing
from slipway.platforms.local.platform import LocalPlatform
from tests.conftest import until
from tests.platforms import stand
from tests.serving import packages

RESULTS = Path(__file__).parent / "results" / "rotation.json"
TINY, LARGE, ITEMS = "1", "2", 50_000
RATE_RPS, SECONDS, FAULT_AT_S, STALL_S, LOOK_S = 200.0, 4.0, 1.0, 2.0, 0.01
START_WITHIN_S, OUT_WITHIN_S = 2.0, 1.0


@dataclass
class Watch:
    """What the gateway said of its replicas, and when (s of the monotonic clock)."""

    samples: list[tuple[float, frozenset[str]]] = field(default_factory=list)
    """The moment and the addresses that it asks."""

    def first(self, asked: bool, address: str, since: float) -> float:
        """Give the first moment after `since` at which `address` is asked, or is not; infinite if there is none."""
        moments = (moment for moment, ready in self.samples if moment > since and (address in ready) is asked)
        return next(moments, float("inf"))


@dataclass(frozen=True)
class Round:
    """One fault under traffic."""

    out_s: float
    """From the fault until the gateway asks the replica no more; infinite if it does so again during a stall."""
    seen: load.Seen
    after_ms: load.Floats
    """Latencies of the good answers to those who came in the second after the fault."""
    lag_ms: load.Floats
    """The generator's own part of them."""


def main() -> None:
    """Bring the stack up, measure, tell."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rotation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8, help="starts and faults of each kind (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of the figures (default: %(default)s)")
    options = parser.parse_args()
    params = stand.params()
    with tempfile.TemporaryDirectory(prefix="rotation-") as name:
        home = Path(name)
        with stand.running(home, params, ["redis", "gateway"]) as up:
            stand.publish(TINY)
            stand.publish(LARGE, package=packages.seal(home / "large", items=ITEMS, width=128))
            claims = []
            for version, what in ((LARGE, f"a ranker of {ITEMS:,} items"), (TINY, "a tiny ranker")):
                up.platform.deploy("ranker", version, 1, 120)
                found = [start(up.platform, version) for _ in range(options.rounds)]
                claims.append(within(f"one more replica of {what}: in rotation after", found, START_WITHIN_S))
                up.platform.scale(version, 2, 120)
            up.platform.route(Routing(TINY))
            up.platform.remove(LARGE)
            for fault in Fault:
                rounds = [suffer(up.platform, params.stack.gateway_port, fault, n) for n in range(options.rounds)]
                claims += told(fault, rounds)
    tell("Into and out of rotation", "python -m benchmarks.rotation", claims, options.json)


@contextmanager
def watched() -> Iterator[Watch]:
    """Look at the gateway all the time."""
    states = Watch()

    def look() -> None:
        ready = watch.asked()
        states.samples.append((time.monotonic(), ready))

    with watch.looking(look, LOOK_S):
        yield states


def start(platform: LocalPlatform, version: str) -> float:
    """Seconds until a second replica is asked; it is gone again afterwards."""
    (old,) = platform.status().replicas[version]
    with watched() as states:
        began = time.monotonic()
        platform.scale(version, 2, 60)
        (new,) = {one.address for one in platform.status().replicas[version]} - {old.address}
        until(lambda: states.first(asked=True, address=new, since=began) < float("inf"))
    platform.scale(version, 1, 60)
    return states.first(asked=True, address=new, since=began) - began


def suffer(platform: LocalPlatform, port: int, fault: Fault, number: int) -> Round:
    """Do `fault` to one of the two replicas under traffic, and wait until both are asked again."""
    victim = platform.status().replicas[TINY][number % 2]
    at: list[float] = []

    def hurt() -> None:
        time.sleep(FAULT_AT_S)
        at.append(time.monotonic())
        platform.inject(victim, fault)
        time.sleep(STALL_S)
        at.append(time.monotonic())
        platform.heal(victim)

    due = load.poisson(RATE_RPS, SECONDS, seed=number)
    requests = [load.post("/v1/recommend", sample["request"]) for sample in stand.samples()]
    hurting = threading.Thread(target=hurt)
    with watched() as states:
        began = time.monotonic()
        hurting.start()
        seen = load.open_loop(("127.0.0.1", port), requests, due)
        hurting.join()
        until(lambda: len(watch.asked()) == 2, 60)
    broken, healed = at
    out = states.first(asked=False, address=victim.address, since=broken)
    again = states.first(asked=True, address=victim.address, since=out)
    if fault is Fault.STALL and again < healed:
        out = float("inf")
    print(f"{fault}: out {out - broken:.3f} s, asked again {again - broken:.2f} s; {seen}", file=sys.stderr)
    after = (due >= broken - began - 0.05) & (due < broken - began + 1) & (seen.status == 200)
    return Round(out - broken, seen, seen.latency_s[after] * 1e3, seen.lag_s[after] * 1e3)


def told(fault: Fault, rounds: Sequence[Round]) -> Sequence[Claim]:
    """Make the rows of one fault."""
    name = {Fault.KILL: "killed (SIGKILL)", Fault.STALL: "stalled (SIGSTOP)"}[fault]
    sent = sum(len(one.seen.due_s) for one in rounds)
    failed = sum(int((one.seen.status != 200).sum()) for one in rounds)
    p99, lag = (
        float(np.quantile(np.concatenate(values), 0.99, method="inverted_cdf"))
        for values in ([one.after_ms for one in rounds], [one.lag_ms for one in rounds])
    )
    slowest = max(float(one.after_ms.max()) for one in rounds)  # those whom it was answering
    ours = f"{failed} of {sent:,}; P99 {p99:.1f} ms (the generator's own lag: {lag:.1f}), slowest {slowest:.0f} ms"
    return [
        within(f"one of two replicas {name}: out of rotation after", [one.out_s for one in rounds], OUT_WITHIN_S),
        Claim(
            f"the same {fault}: failed requests; latency in the second after it",
            "0 failed",
            "",
            ours,
            float("nan"),
            failed == 0,
        ),
    ]


def within(what: str, found: Sequence[float], limit_s: float) -> Claim:
    """Judge the worst of some durations."""
    median, worst = statistics.median(found), max(found)
    ours = f"median {median:.2f} s, worst of {len(found)} {worst:.2f} s"
    return Claim(what, f"< {limit_s:g} s", "", ours, limit_s / worst, worst < limit_s)


if __name__ == "__main__":
    main()
