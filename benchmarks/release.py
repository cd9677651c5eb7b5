"""A release under steady load: requests that failed, the worst P99 of each phase, and how fast a bad canary is gone.

    python -m benchmarks.release [--rate 50]

Runs on a service of its own with tiny rankers, in two minutes: a first release, a good one through deploy, canary,
chaos, promotion and rollback, then three bad ones: useless answers, failing, slow. Users' requests come in an open
loop beside what the stages replay. Prints a table and writes benchmarks/results/release.json.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from slipway import artifacts
from slipway.errors import CanaryRejectedError
from slipway.params import PromoteParams
from slipway.platforms.base import Routing
from slipway.release.replay import Replay
from tests.release import candidates
from tests.release.service import Service, service

RESULTS = Path(__file__).parent / "results" / "release.json"
LINE = "{:<38}{:>9}{:>8}{:>9}{:>9}"
BAD: dict[str, Callable[[Path], Path]] = {
    "useless answers": candidates.useless,
    "failing": candidates.failing,
    "slow": candidates.slow,
}

Row = dict[str, Any]


def phase(users: Replay, name: str, work: Callable[[], object]) -> Row:
    """Do `work` and sum up what users saw meanwhile."""
    since_s = users.now_s()
    work()
    until_s = users.now_s()
    time.sleep(0.5)  # the last answers
    row = {"phase": name, "seconds": round(until_s - since_s, 1), **asdict(users.figures(since_s, until_s))}
    print(
        LINE.format(name, row["requests"], row["failed"], f"{row['p99_ms']:.1f}", f"{row['seconds']:.1f}"), flush=True
    )
    return row


def good_release(running: Service, users: Replay, version: str) -> list[Row]:
    """Replace the champion by a good version step by step, and go back while the old one is warm."""
    rows = [phase(users, "good release: deploy", lambda: running.step("deploy", version=version))]
    rows += [phase(users, f"good release: {step}", partial(running.step, step)) for step in ("canary", "chaos")]
    warm = running.params.model_copy(update={"promote": PromoteParams(warm_s=5.0)})
    promotion = threading.Thread(target=lambda: running.step("promote", warm))

    def promote() -> None:
        promotion.start()
        while running.platform.status().routing != Routing(champion=version):
            time.sleep(0.05)
        time.sleep(1.0)

    rows.append(phase(users, "good release: promote", promote))
    rows.append(phase(users, "rollback to the warm version", lambda: running.step("rollback")))
    promotion.join()
    return rows


def bad_release(running: Service, users: Replay, name: str, version: str) -> tuple[Row, Row]:
    """Try a bad candidate; what users saw, and how soon it had no traffic."""
    running.step("deploy", version=version)

    def canary() -> None:
        try:
            running.step("canary")
        except CanaryRejectedError:
            return
        raise AssertionError(f"the candidate was not rejected: {name}")

    row = phase(users, f"bad release: {name}", canary)
    running.step("rollback", only_canary=True)
    report = running.report("canary")
    keys = ("seconds_first_bad_to_zero_traffic", "seconds_verdict_to_zero_traffic")
    return row, {"candidate": name, "reasons": report["steps"][-1]["reasons"], **{key: report[key] for key in keys}}


def measure(running: Service, rate_rps: float) -> dict[str, Any]:
    """Run all releases on a service; the figures."""
    first = running.register("one", candidates.good)
    second = running.register("two", lambda folder: candidates.good(folder, scale=1.1))
    versions = {name: running.register(name, make) for name, make in BAD.items()}
    running.step("deploy", version=first)  # before it there is nothing that users could ask
    print(LINE.format("phase", "requests", "failed", "P99 ms", "s"))
    with running.load(rate_rps) as users:
        rows = [phase(users, "first release: canary", lambda: running.step("canary"))]
        rows.append(phase(users, "first release: promote", lambda: running.step("promote")))
        rows += good_release(running, users, second)
        bad = [bad_release(running, users, name, version) for name, version in versions.items()]
    rows += [row for row, _ in bad]
    total = users.figures()
    print(LINE.format("all", total.requests, total.failed, f"{total.p99_ms:.1f}", f"{users.now_s():.1f}"))
    for _, told in bad:
        seconds = told["seconds_first_bad_to_zero_traffic"], told["seconds_verdict_to_zero_traffic"]
        print(
            f"{told['candidate']}: no traffic {seconds[0]:.1f} s after its first bad answer, {seconds[1]:.2f} s after"
        )
        print(f"    the verdict: {'; '.join(told['reasons'])}")
    print(f"lag of the generator, P99: {total.lag_p99_ms:.1f} ms, contained in the latencies")
    return {"rate_rps": rate_rps, "total": asdict(total), "phases": rows, "bad_candidates": [told for _, told in bad]}


def run(rate_rps: float = 50.0) -> dict[str, Any]:
    """Measure on a service of one's own; the figures, which are written to `RESULTS` too."""
    with tempfile.TemporaryDirectory(prefix="slipway-") as folder, service(Path(folder)) as running:
        figures = measure(running, rate_rps)
    artifacts.write_json(RESULTS, figures)
    return figures


def main() -> None:
    """Run, print, and fail if a request did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=50.0, help="users' requests a second, beside the replay")
    figures = run(parser.parse_args().rate)
    if figures["total"]["failed"]:
        raise SystemExit(f"{figures['total']['failed']} requests failed")


if __name__ == "__main__":
    main()
