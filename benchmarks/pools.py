"""A day of users, compressed in time, over two pools; and what a batch load does to them: `python -m benchmarks.pools`.

A stack of its own with nginx and real replicas. The day is a sinusoid from 30 requests/s at night to 650 in the evening
(no data with times travel with the project), with bursts of a second at thrice the rate; the dwell time is compressed
like the day. The pools are one replica against two with larger batches, for there is no GPU here. Their prices are
assumed, .10 and .90 an hour, so the cost at a low rate is theirs and nothing measured. Both run all day; the cost is
what it would be if the idle one slept. Flapping is judged against one limit of 300 requests/s without hysteresis, on
the same measured rate.

Interference: users at 100 requests/s, in turn alone, beside a batch load as fast as 16 clients go, and beside the same
load without its class. Medians of the rounds in which the generator itself lagged by less than a
tenth of the P99, or a millisecond; without one there is no figure. Writes
benchmarks/results/pools.json. About 3 minutes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import load, watch
from benchmarks.claims import Claim, tell
from slipway.config import PoolParams, PoolsParams
from slipway.platforms.base import Routing
from slipway.platforms.local import gateway
from slipway.platforms.local.layout import here
from tests.platforms import stand

RESULTS = Path(__file__).parent / "results" / "pools.json"
SMALL, LARGE, BATCH = "small", "large", "nightly"
PRICES = {SMALL: 0.10, LARGE: 0.90}  # of the whole pool, for an hour
KINDS = (
    PoolParams(name=SMALL, replicas=1, max_batch=8, price_per_hour=PRICES[SMALL]),
    PoolParams(name=LARGE, replicas=2, max_batch=64, price_per_hour=PRICES[LARGE] / 2),
    PoolParams(name=BATCH, requests="batch", replicas=1, max_batch=64),
)
NIGHT_RPS, EVENING_RPS, BURSTS, ONE_LIMIT_RPS = 30.0, 650.0, 5, 300.0
USERS_RPS, CLIENTS, ROUNDS, ROUND_S = 100.0, 16, 4, 4.0
LOADS = ("alone", "batch", "realtime")


def main() -> None:
    """Bring the stack up, measure both, tell."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pools", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the day (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of the figures (default: %(default)s)")
    parser.add_argument("--flood", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.flood:
        flood(int(options.flood[0]), options.flood[1], float(options.flood[2]))
        return
    with tempfile.TemporaryDirectory(prefix="pools-") as home:
        params = stand.params().model_copy(update={"pools": PoolsParams(kinds=KINDS, dwell_s=5.0)})
        with stand.running(Path(home), params, ["redis", "gateway"]) as up:
            stand.publish("1")
            up.platform.deploy("ranker", "1", 1, 120)
            up.platform.route(Routing("1"))
            port = params.stack.gateway_port
            claims = [*day(port, options.seconds), *interference(port)]
    tell("Pools", "python -m benchmarks.pools", claims, options.json)


def requests(request_class: str) -> list[bytes]:
    """Some users' requests of a class."""
    headers = {"X-Request-Class": request_class}
    return [load.post("/v1/recommend", sample["request"], headers) for sample in stand.samples()]


def curve(at_s: load.Floats, seconds: float) -> load.Floats:
    """Requests/s at moments of the day, [N]."""
    rate = NIGHT_RPS + (EVENING_RPS - NIGHT_RPS) * np.sin(np.pi * at_s / seconds) ** 4
    for burst in range(BURSTS):
        begin = seconds * (burst + 0.5) / BURSTS
        rate = np.where((at_s >= begin) & (at_s < begin + 1), np.minimum(3 * rate, 900.0), rate)
    return rate


def day(port: int, seconds: float) -> Sequence[Claim]:
    """Replay it, and look at the gateway four times a second meanwhile."""
    due = load.poisson(900.0, seconds, seed=3)
    due = due[np.random.default_rng(4).random(len(due)) < curve(due, seconds) / 900.0]
    samples: list[Any] = []
    with watch.looking(lambda: samples.append(gateway.state(here())), 0.25):
        seen = load.open_loop(("127.0.0.1", port), requests("realtime"), due)
    print(f"day: {seen}", file=sys.stderr)
    pools = [{pool["name"]: pool for pool in state["pools"]} for state in samples]
    active = {
        name: statistics.mean(pool[name]["weight"] > 0 or bool(pool[name]["wanted"]) for pool in pools)
        for name in PRICES
    }
    switches = sum(pools[-1][name]["switches"] for name in PRICES)
    above = [state["rate_rps"] > ONE_LIMIT_RPS for state in samples]
    crossings = sum(before != after for before, after in pairwise(above))
    failed = len(due) - seen.statuses.get(200, 0)
    million = 1e6 * seconds / 3600 / len(due)
    ours = sum(PRICES[name] * share for name, share in active.items()) * million
    alone = {name: price * million for name, price in PRICES.items()}
    busy = curve(due, seconds) >= 500
    at_high = float(np.quantile(seen.latency_s[busy], 0.99, method="inverted_cdf")) * 1e3
    lag = f"the generator's own lag: {seen.lag_p99_ms:.1f}"
    saved = 1 - ours / alone[LARGE]
    return [
        Claim("requests failed in a day", "none", "", f"{failed} of {len(due)}", 1.0, failed == 0),
        Claim(
            *("switches in a day, bursts too", "no flapping", f"{crossings} with one limit", str(switches)),
            *(crossings / max(switches, 1), switches <= 2),
        ),
        Claim(
            *("cost of a million requests, the day", "-80 % at low rate", f"{alone[LARGE]:.3f} by {LARGE} alone"),
            *(f"{ours:.3f} (-{saved:.0%}; {SMALL} alone {alone[SMALL]:.3f})", alone[LARGE] / ours, saved >= 0.8),
        ),
        Claim("P99 at 500 requests/s and over", "< 50 ms", "", f"{at_high:.1f} ms ({lag})", 50 / at_high, at_high < 50),
    ]


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
