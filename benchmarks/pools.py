"""A day of users, compressed in time, over two pools; and what a batch load does to them: `python -m benchmarks.pools`.

A stack of its own with nginx, real replicas, and the autoscaler, which lets the pool sleep that is not needed. The day
is 30 + 620 sin⁴ requests/s from the depth of one night to that of the next (no data with times travel with the
project): 39 % of it, 9.4 hours, are under 100 requests/s, 23 % over 500, the mean is two fifths of the peak; with
bursts of a second at thrice the rate. The pools are one replica against two with larger batches, for there is no GPU
here; they have the list prices of what they stand for, a machine of 4 processors and one with a GPU (AWS c6i.xlarge,
.17 an hour, and g5.xlarge, 1.006).
Flapping is judged against one limit of 300 requests/s without hysteresis, on the same measured rate.

Cost is the time that each replica was there, from before its start to the end of its drain, times its price. What a
switch takes (the rate's window, start, move, drain; the dwell time, 5 s here in place of 60) does not shrink with the
day, so it weighs more than in a real one: the cost is told as measured, and for a day of 24 hours with the same
switches, where the seconds that a pool was awake beyond what the curve asks for stay as measured, and 55 are added.

Interference: users at 100 requests/s, in turn alone, beside a batch load as fast as 16 clients go, and beside the same
load without its class. Medians of the rounds in which the generator itself lagged by less than a
tenth of the P99, or a millisecond; without one there is no figure. Writes
benchmarks/results/pools.json, with the cost at other prices. About 6 minutes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import load, watch
from benchmarks.claims import Claim, tell
from slipway import artifacts
from slipway.params import PoolParams, PoolsParams
from slipway.platforms.base import Routing
from slipway.platforms.local import gateway, stack
from slipway.platforms.local.layout import here
from tests.conftest import until
from tests.platforms import stand

RESULTS = Path(__file__).parent / "results" / "pools.json"
SMALL, LARGE, BATCH = "small", "large", "nightly"
PRICES = {SMALL: 0.17, LARGE: 1.006}  # of the whole pool, for an hour
RATIOS = (3.0, 5.0, 9.0, 18.0)  # other prices of the large pool over the small one's
DAY_S, DWELL_S, USUAL_DWELL_S = 86_400.0, 5.0, 60.0
KINDS = (
    PoolParams(name=SMALL, replicas=1, max_batch=8, price_per_hour=PRICES[SMALL]),
    PoolParams(name=LARGE, replicas=2, max_batch=64, price_per_hour=PRICES[LARGE] / 2),
    PoolParams(name=BATCH, requests="batch", replicas=1, max_batch=64),
)
NIGHT_RPS, EVENING_RPS, BURSTS, ONE_LIMIT_RPS = 30.0, 650.0, 5, 300.0
LOW_RPS, HIGH_RPS = 100.0, 500.0
USERS_RPS, CLIENTS, ROUNDS, ROUND_S = 100.0, 16, 4, 4.0
LOADS = ("alone", "batch", "realtime")


def main() -> None:
    """Bring the stack up, measure both, tell."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pools", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=240.0, help="length of the day (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of the figures (default: %(default)s)")
    parser.add_argument("--flood", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.flood:
        flood(int(options.flood[0]), options.flood[1], float(options.flood[2]))
        return
    with tempfile.TemporaryDirectory(prefix="pools-") as home:
        limits = PoolsParams(kinds=KINDS, low_rps=LOW_RPS, high_rps=HIGH_RPS, dwell_s=DWELL_S)
        params = stand.params().model_copy(update={"pools": limits})
        with stand.running(Path(home), params, ["redis", "gateway"]) as up:
            stand.publish("1")
            up.platform.deploy("ranker", "1", 1, 120)
            up.platform.route(Routing("1"))
            port = params.stack.gateway_port
            between = interference(port)  # both pools awake all the time, so that none wakes in a round
            stack.up(params, ["autoscaler"], tell=lambda _: None)
            until(lambda: replicas()[LARGE] == 0)
            claims, costs = day(port, options.seconds)
    tell("Pools", "python -m benchmarks.pools", [*claims, *between], options.json, {"costs": costs})


def requests(request_class: str) -> list[bytes]:
    """Some users' requests of a class."""
    headers = {"X-Request-Class": request_class}
    return [load.post("/v1/recommend", sample["request"], headers) for sample in stand.samples()]


def smooth(at_s: load.Floats, seconds: float) -> load.Floats:
    """Requests/s at moments of a day without bursts, [N]."""
    return NIGHT_RPS + (EVENING_RPS - NIGHT_RPS) * np.sin(np.pi * at_s / seconds) ** 4


def curve(at_s: load.Floats, seconds: float) -> load.Floats:
    """Requests/s at moments of the day, [N]."""
    rate = smooth(at_s, seconds)
    for burst in range(BURSTS):
        begin = seconds * (burst + 0.5) / BURSTS
        rate = np.where((at_s >= begin) & (at_s < begin + 1), np.minimum(3 * rate, 900.0), rate)
    return rate


def replicas() -> dict[str, int]:
    """Replicas by realtime pool, those that start and those that drain, too."""
    deployments = artifacts.read_json(here().platform_file)["deployments"].values()
    each = Counter(replica["pool"] for deployment in deployments for replica in deployment["replicas"])
    return {name: each[name] for name in PRICES}


class Sample(NamedTuple):
    """One look."""

    at_s: float
    """Since the day began."""
    state: Any
    """What the gateway says."""
    replicas: Mapping[str, int]


def day(port: int, seconds: float) -> tuple[Sequence[Claim], Mapping[str, Any]]:
    """Replay it, and look at gateway and replicas four times a second meanwhile."""
    due = load.poisson(900.0, seconds, seed=3)
    due = due[np.random.default_rng(4).random(len(due)) < curve(due, seconds) / 900.0]
    samples: list[Sample] = []
    began = time.monotonic()
    with watch.looking(
        lambda: samples.append(Sample(time.monotonic() - began, gateway.state(here()), replicas())), 0.25
    ):
        seen = load.open_loop(("127.0.0.1", port), requests("realtime"), due)
    print(f"day: {seen}", file=sys.stderr)
    pools = {pool["name"]: pool for pool in samples[-1].state["pools"]}
    switches = sum(pools[name]["switches"] for name in PRICES) - sum(
        pool["switches"] for pool in samples[0].state["pools"]
    )
    above = [sample.state["rate_rps"] > ONE_LIMIT_RPS for sample in samples]
    crossings = sum(before != after for before, after in pairwise(above))
    failed = len(due) - seen.statuses.get(200, 0)
    busy = curve(due, seconds) >= HIGH_RPS
    at_high = float(np.quantile(seen.latency_s[busy], 0.99, method="inverted_cdf")) * 1e3
    lag = f"the generator's own lag: {seen.lag_p99_ms:.1f}"
    costs = Costs(samples, seconds, len(due))
    alone, measured, whole, low = costs.alone(LARGE), costs.measured(), costs.whole_day(), costs.low()
    return [
        Claim("requests failed in a day", "none", "", f"{failed} of {len(due)}", 1.0, failed == 0),
        Claim(
            *("switches in a day, bursts too", "no flapping", f"{crossings} with one limit", str(switches)),
            *(crossings / max(switches, 1), switches <= 2),
        ),
        Claim(
            *("cost of an hour under 100 requests/s", "-80 % at low rate", f"{PRICES[LARGE]:.3f} by {LARGE} alone"),
            *(f"{low:.3f} (-{1 - low / PRICES[LARGE]:.0%})", PRICES[LARGE] / low, low <= 0.2 * PRICES[LARGE]),
        ),
        Claim(
            *("cost of a million requests, a day of 24 hours", "-80 %", f"{alone:.3f} by {LARGE} alone"),
            f"{whole:.3f} (-{1 - whole / alone:.0%}; {SMALL} alone {costs.alone(SMALL):.3f})",
            *(alone / whole, whole <= 0.2 * alone),
        ),
        Claim(
            *(f"the same, as measured in a day of {seconds:.0f} s", "-80 %", f"{alone:.3f} by {LARGE} alone"),
            *(f"{measured:.3f} (-{1 - measured / alone:.0%})", alone / measured, measured <= 0.2 * alone),
        ),
        Claim("P99 at 500 requests/s and over", "< 50 ms", "", f"{at_high:.1f} ms ({lag})", 50 / at_high, at_high < 50),
    ], costs.told()


class Costs:
    """What the replicas of a day cost.

    Args:
        samples: of the day.
        seconds: its length.
        requests: that were answered in it.
    """

    def __init__(self, samples: Sequence[Sample], seconds: float, requests: int) -> None:
        self._seconds, self._millions = seconds, requests / 1e6
        at_s = np.array([sample.at_s for sample in samples])
        each_s, rate = np.diff(at_s, append=seconds), smooth(at_s, seconds)
        # By the curve alone the large pool has the users from the rise over one limit to the fall under the other.
        rises = at_s[np.argmax(rate >= HIGH_RPS)]
        falls = at_s[np.argmax((at_s > rises) & (rate < LOW_RPS))]
        large = np.where((at_s >= rises) & (at_s < falls), each_s, 0.0)
        self._asked = {SMALL: seconds - float(large.sum()), LARGE: float(large.sum())}
        whole = {kind.name: kind.replicas or 1 for kind in KINDS}
        awake = {name: np.array([sample.replicas[name] / whole[name] for sample in samples]) for name in PRICES}
        self._awake = {name: float((share * each_s).sum()) for name, share in awake.items()}
        self._low_s = float(each_s[rate < LOW_RPS].sum())
        self._large_low_s = float((awake[LARGE] * each_s)[rate < LOW_RPS].sum())

    def alone(self, name: str, prices: Mapping[str, float] = PRICES) -> float:
        """Cost of a million requests by one pool that is always awake."""
        return prices[name] * self._seconds / 3600 / self._millions

    def measured(self) -> float:
        """Cost of a million requests, as it was."""
        return sum(PRICES[name] * seconds for name, seconds in self._awake.items()) / 3600 / self._millions

    def _whole_day_s(self) -> dict[str, float]:
        stretch, dwell_s = DAY_S / self._seconds, USUAL_DWELL_S - DWELL_S
        beyond = {name: self._awake[name] - asked for name, asked in self._asked.items()}
        beyond[LARGE] += dwell_s
        beyond[SMALL] -= dwell_s
        return {name: asked * stretch + beyond[name] for name, asked in self._asked.items()}

    def whole_day(self, prices: Mapping[str, float] = PRICES) -> float:
        """Cost of a million requests of a day with 24 hours."""
        awake = self._whole_day_s()
        return sum(prices[name] * awake[name] for name in awake) / 3600 / (self._millions * DAY_S / self._seconds)

    def low(self) -> float:
        """Cost of an hour under the lower limit in a day with 24 hours: the small pool, and the large one's rest."""
        large_s = self._large_low_s + USUAL_DWELL_S - DWELL_S
        return PRICES[SMALL] + PRICES[LARGE] * large_s / (self._low_s * DAY_S / self._seconds)

    def told(self) -> Mapping[str, Any]:
        """What it was made of, and the saving over the large pool alone at other prices."""
        saved = {}
        for ratio in RATIOS:
            prices = {SMALL: 1.0, LARGE: ratio}
            saved[f"{ratio:g}"] = round(1 - self.whole_day(prices) / self.alone(LARGE, prices), 3)
        told = {
            "prices_per_hour": PRICES,
            "awake_s": self._awake,
            "asked_for_by_the_curve_s": self._asked,
            "large_awake_under_100_rps_s": self._large_low_s,
            "share_of_24_hours_awake": {name: seconds / DAY_S for name, seconds in self._whole_day_s().items()},
            "saved_in_24_hours_by_price_ratio": saved,
        }
        print(f"costs: {told}", file=sys.stderr)
        return told


def interference(port: int) -> Sequence[Claim]:
    """P99 of users in turn alone, beside batch requests, and beside as many that do not say so."""
    found: dict[str, list[float]] = {name: [] for name in LOADS}
    for number in range(ROUNDS):
        for name in LOADS:
            with flooded(port, name):
                due = load.poisson(USERS_RPS, ROUND_S, seed=number)
                seen = load.open_loop(("127.0.0.1", port), requests("realtime"), due)
            print(f"{name}: {seen}", file=sys.stderr)
            if seen.lag_p99_ms < load.MAX_LAG * seen.quantile_ms(0.99) or seen.lag_p99_ms < 1:
                found[name].append(seen.quantile_ms(0.99))
    print(f"rounds that count: { {name: len(values) for name, values in found.items()} }", file=sys.stderr)
    what, published = "users' P99 beside a batch load at full speed", "moves by < 20 %"
    if not (found["alone"] and found["batch"]):
        return [Claim(what, published, "", "no figure: the generator lagged", 0.0, False)]
    alone, batch = statistics.median(found["alone"]), statistics.median(found["batch"])
    unmarked = f"{statistics.median(found['realtime']):.2f} ms" if found["realtime"] else "no figure"
    ours = f"{batch:.2f} ms (were it not marked as batch: {unmarked})"
    return [Claim(what, published, f"{alone:.2f} ms without it", ours, alone / batch, batch < 1.2 * alone)]


@contextmanager
def flooded(port: int, name: str) -> Iterator[None]:
    """A load from a process of its own, which takes no processor time from what is measured."""
    if name == "alone":
        yield
        return
    words = [sys.executable, "-m", "benchmarks.pools", "--flood", str(port), name, str(ROUND_S + 3)]
    with subprocess.Popen(["chrt", "--idle", "0", *words]) as process:
        time.sleep(2)
        yield
        process.wait(30)


def flood(port: int, request_class: str, seconds: float) -> None:
    """Ask as fast as the answers come."""
    counts = load.closed_loop(("127.0.0.1", port), requests(request_class), CLIENTS, seconds)
    print(f"{request_class} load: {sum(counts.values()) / seconds:.0f}/s {dict(counts)}", file=sys.stderr)


if __name__ == "__main__":
    main()
