"""How often does the canary analysis roll back a good candidate, and how soon a bad one? A simulation.

    python -m benchmarks.verdicts [--canaries 2000]

Every simulated canary goes through the default steps under steady traffic and is judged every second with the code of
the release. Prints the share that was rolled back and the seconds from the first canary request to that verdict, and
writes benchmarks/results/verdicts.json.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slipway import artifacts
from slipway.params import CanaryParams, SloParams
from slipway.release.analysis import Histogram, Limits, Track, Verdict, Window, judge

RESULTS = Path(__file__).parent / "results" / "verdicts.json"
LIMITS = Limits(CanaryParams(), SloParams())
BOUNDS_MS = (1.0, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 50.0, 75.0, 100.0, 150.0, 300.0, float("inf"))


@dataclass(frozen=True)
class Behaviour:
    """What a simulated version does to its requests."""

    error_ratio: float = 0.0002
    hit_ratio: float = 0.3
    median_ms: float = 3.0
    spread: float = 0.5
    """Standard deviation of the logarithm of the latency; 0.5 puts P99 at 3.2 times the median."""


@dataclass(frozen=True)
class Outcome:
    """How one simulated canary ended."""

    verdict: Verdict
    seconds: float
    """Since its first request."""


CHAMPION = Behaviour()
CASES: dict[str, tuple[Behaviour, Behaviour]] = {
    # name: (champion, canary)
    "identical": (CHAMPION, CHAMPION),
    "identical, both far over the error limit": (replace(CHAMPION, error_ratio=0.02),) * 2,
    "identical, both far over the latency limit": (replace(CHAMPION, median_ms=80.0),) * 2,
    "exactly at the error limit": (CHAMPION, replace(CHAMPION, error_ratio=LIMITS.slo.max_error_ratio)),
    "exactly at the metric limit": (CHAMPION, replace(CHAMPION, hit_ratio=0.24)),
    "1 % of attempts fail": (CHAMPION, replace(CHAMPION, error_ratio=0.01)),
    "all attempts fail": (CHAMPION, replace(CHAMPION, error_ratio=1.0)),
    "four times slower": (CHAMPION, replace(CHAMPION, median_ms=12.0)),
    "half of the hits": (CHAMPION, replace(CHAMPION, hit_ratio=0.15)),
    "useless answers": (CHAMPION, replace(CHAMPION, hit_ratio=0.01)),
}


def simulate(champion: Behaviour, canary: Behaviour, seed: int, rate_rps: float = 50.0) -> Outcome:
    """Run one canary through the default steps, looking at it every second."""
    random = np.random.default_rng(seed)
    earlier: list[Window] = []
    seconds = 0.0
    for weight in LIMITS.canary.step_weights:
        window = Window(Track(), Track())
        holds = 0
        while True:
            for _ in range(round(LIMITS.canary.interval_s)):
                window = _later(window, champion, canary, weight * rate_rps, (1 - weight) * rate_rps, random)
                seconds += 1
                verdict = judge(window, LIMITS, earlier).verdict
                if verdict is Verdict.ROLLBACK:
                    return Outcome(verdict, seconds)
            if verdict is Verdict.ADVANCE:
                break
            holds += 1
            if holds > LIMITS.canary.max_holds:
                return Outcome(Verdict.HOLD, seconds)
        earlier.append(window)
    return Outcome(Verdict.ADVANCE, seconds)


def _later(
    window: Window,
    champion: Behaviour,
    canary: Behaviour,
    canary_rps: float,
    champion_rps: float,
    random: np.random.Generator,
) -> Window:
    assert window.champion is not None
    return Window(
        _second(window.canary, canary, random.poisson(canary_rps), random),
        _second(window.champion, champion, random.poisson(champion_rps), random),
    )


def _second(track: Track, does: Behaviour, requests: int, random: np.random.Generator) -> Track:
    """A second later; the gateway heals failed attempts, so that no request fails."""
    latencies = does.median_ms * np.exp(random.normal(0, does.spread, requests))
    return Track(
        requests=track.requests + requests,
        attempts=track.attempts + requests,
        errors=track.errors + int(random.binomial(requests, does.error_ratio)),
        latency=Histogram(BOUNDS_MS, _counted(track.latency, latencies)),
        feedbacks=track.feedbacks + requests,
        hits=track.hits + int(random.binomial(requests, does.hit_ratio)),
    )


def _counted(before: Histogram, latencies: npt.NDArray[np.float64]) -> tuple[int, ...]:
    new = np.bincount(np.searchsorted(BOUNDS_MS, latencies), minlength=len(BOUNDS_MS))
    return tuple(int(n) for n in new + np.array(before.counts or [0] * len(BOUNDS_MS)))


def rolled_back(name: str, canaries: int) -> tuple[float, float]:
    """Simulate a case: the share of canaries that were rolled back, and the median seconds until then."""
    ends = [simulate(*CASES[name], seed=seed) for seed in range(canaries)]
    seconds = [end.seconds for end in ends if end.verdict is Verdict.ROLLBACK]
    return len(seconds) / canaries, float(np.median(seconds)) if seconds else float("nan")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canaries", type=int, default=500, help="simulated canaries of each case")
    canaries = parser.parse_args().canaries
    print(f"{'candidate':<45}{'rolled back':>12}{'median s':>10}    of {canaries} canaries at 50 requests/s")
    cases = {}
    for name in CASES:
        share, seconds = rolled_back(name, canaries)
        cases[name] = {"rolled_back": share, "median_s": seconds if np.isfinite(seconds) else None}
        print(f"{name:<45}{share:>12.1%}{seconds:>10.0f}")
    artifacts.write_json(RESULTS, {"canaries": canaries, "cases": cases})


if __name__ == "__main__":
    main()
