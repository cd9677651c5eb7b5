"""The whole case, one plain replica against everything on: `python -m benchmarks.serving.case`, about five minutes.

A ranker of 50,000 items, width 128 and 2 blocks, with random weights, which cost as much as learned ones (what INT8
does to answers is for `benchmarks.compression` to tell). FP32 and INT8 each run in the engine that `compress` finds the
fastest for them. Users ask by Zipf's law, through nginx; behind it stand five versions, each with one thing more than
the one before, and users are moved from one to the next:

    one replica, FP32          two engine threads, no batching, no cache
    + INT8                     its compressed form
    + batching                 what waits runs together
    + a replica for each core  with one engine thread
    + cache                    in the memory of each, and in a Redis that both share: everything on

Requests/s within 100 ms: the highest rate of an open loop at which 99 % are answered within 100 ms and none fails. The
rate doubles until that is missed twice, then what lies between is halved, in steps of a few seconds in which the
versions take turns. At the highest rate of the first one all are measured again, for P99 and processor time.

Generator and nginx share the two cores with the replicas and take processor time from them at a high rate; the
generator's lag is told, and counts as latency. An hour of the machine has an assumed price, so the cost of a request
follows from the rate alone.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import load, questions
from benchmarks.claims import Claim, tell
from benchmarks.serving.sides import Running
from slipway import package, trained
from slipway.compression import build, recipes, search
from slipway.params import CacheParams, Params, ServeParams
from slipway.platforms.base import Routing
from slipway.platforms.local.layout import here
from slipway.platforms.local.platform import LocalPlatform
from slipway.platforms.local.supervisor import Supervisor
from slipway.reporting import PALETTE, canvas
from slipway.workloads.ranker.export import Export
from slipway.workloads.ranker.model import Ranker
from slipway.workloads.ranker.params import RankerParams
from tests.platforms import stand
from tests.ranker import data

COMMAND = "python -m benchmarks.serving.case"
DIFFERENT, WARM, WARM_RPS = 50_000, 20_000, 1000.0
WITHIN_S, SHARE = 0.1, 0.99
LOWEST_RPS, CLOSE = 100.0, 1.1
STEP_S, ROUNDS, ROUND_S = 3.0, 3, 4.0
PRICE = 0.10  # of a machine with two cores, for an hour
SEED = 0

Point = tuple[float, float | None]
"""Requests/s, and their P99 (ms) if none failed."""


@dataclass(frozen=True)
class Side:
    """What a version is."""

    name: str
    recipe: str
    replicas: int
    serve: ServeParams


_WHOLE = ServeParams(max_batch=1, threads=2)  # one replica may use both cores
_BATCHES = ServeParams(max_batch=32, threads=2)
_HALF = ServeParams(max_batch=32, threads=1)
_CACHED = _HALF.model_copy(update={"cache": CacheParams(memory_mb=64, nodes=0)})  # one machine: one Redis is enough
SIDES = (
    Side("one replica, FP32", "fp32", 1, _WHOLE),
    Side("+ INT8", "int8", 1, _WHOLE),
    Side("+ batching", "int8", 1, _BATCHES),
    Side("+ a replica for each core", "int8", 2, _HALF),
    Side("+ cache: everything on", "int8", 2, _CACHED),
)


def main() -> None:
    """Bring the stack up, measure, tell, draw."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw P99 against requests/s here, as PNG")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="case-") as name:
        made = rankers(Path(name) / "made")
        params = stand.params()
        with stand.running(Path(name) / "home", params, ["redis", "gateway"]):
            versions = [Version(str(number), side, made[side.recipe], params) for number, side in enumerate(SIDES, 1)]
            versions[-1].ask(WARM_RPS, WARM / WARM_RPS, seed=1)
            limits, p99_ms = searched(versions)
            same = measured(versions, limits[0])
    tell("The case", COMMAND, [*case(limits, same), *ladder(limits, same)], options.json, {"p99_ms": p99_ms})
    if options.plot:
        plot(p99_ms, options.plot)


def rankers(folder: Path) -> dict[str, Path]:
    """Seal the ranker in FP32 and INT8, each for its fastest engine: packages by recipe."""
    draw = np.random.default_rng(SEED)
    histories = [draw.integers(1, questions.ITEMS + 1, size=size).tolist() for size in draw.integers(5, 51, size=2000)]
    data.write(folder / "data", histories, questions.ITEMS)
    torch.manual_seed(SEED)
    params = RankerParams(width=128, blocks=2, max_length=questions.LONGEST)
    weights = {name: value.detach().numpy() for name, value in Ranker(questions.ITEMS, params).named_parameters()}
    trained.write(folder / "trained", "ranker", weights, params.model_dump())
    export = Export(folder / "data", folder / "trained")
    models = {recipes.FULL: export.fp32(), recipes.parse("int8"): build.calibrated(export, 512, SEED)}
    found = search.fastest(search.forms(models, search.usable("auto"), export, SEED))
    return {form.recipe.name: _sealed(form, export, folder / form.recipe.name) for form in found}


def _sealed(form: search.Form, export: Export, folder: Path) -> Path:
    print(f"{form.recipe.name} in {form.engine}: {dict(form.latency_ms)} ms by batch size", file=sys.stderr)
    folder.mkdir()
    export.files(folder)
    (folder / package.MODEL).write_bytes(form.model)
    golden, names = dict(export.golden()), [spec.name for spec in export.outputs]
    answer = dict(zip(names, form.run(names, golden), strict=True))
    precision = form.recipe.precision
    package.seal(folder, "ranker", precision, export.inputs, export.outputs, (golden, answer), engine=form.engine)
    return folder


class Used(NamedTuple):
    """What a version did for some traffic."""

    p50_ms: float
    p99_ms: float
    processor: float
    """Share of one core that the replicas used."""
    batch: float
    """Mean samples of a run."""
    hits: float
    """Share of the answers that the cache gave."""


class Version:
    """One version that serves, and what it did."""

    def __init__(self, version: str, side: Side, sealed: Path, params: Params) -> None:
        self.side, self._version = side, version
        stand.publish(version, package=sealed)
        self._platform = LocalPlatform(params.model_copy(update={"serve": side.serve}))
        self._platform.deploy("ranker", version, side.replicas, 120)
        self._gateway = ("127.0.0.1", params.stack.gateway_port)
        pids = {name: process.pid for name, process in Supervisor(here()).processes().items()}
        replicas = self._platform.status().replicas[version]
        self._running = [Running(int(one.address.rpartition(":")[2]), pids[one.name]) for one in replicas]

    def ask(self, rate_rps: float, seconds: float, seed: int) -> load.Seen:
        """Move all users here and let them ask; the same ones at the same moments by `seed`."""
        self._platform.route(Routing(self._version))
        due_s = load.poisson(rate_rps, seconds, seed)
        seen = load.open_loop(self._gateway, questions.zipf(len(due_s), DIFFERENT, seed), due_s)
        print(f"{self.side.name}, {rate_rps:,.0f} requests/s: {seen}", file=sys.stderr)
        return seen

    def use(self, rate_rps: float, seconds: float, seed: int) -> Used:
        """Ask, and read the replicas' counters."""
        before = self._counters()
        seen = self.ask(rate_rps, seconds, seed)
        cpu_s, samples, runs = (self._counters() - before).tolist()
        hits = 1 - samples / len(seen.due_s)
        return Used(seen.quantile_ms(0.5), seen.quantile_ms(0.99), cpu_s / seconds, samples / max(runs, 1), hits)

    def _counters(self) -> load.Floats:
        """Processor time (s), samples and runs so far: [3]."""
        counters: load.Floats = np.array([(one.cpu_s(), *one.batches()) for one in self._running]).sum(0)
        return counters


def searched(versions: Sequence[Version]) -> tuple[list[float], dict[str, list[Point]]]:
    """Find the highest rate of each version (requests/s), and what was seen on the way."""
    seeking = [Search() for _ in versions]
    step = 1
    while any(not each.over for each in seeking):
        step += 1
        for version, each in zip(versions, seeking, strict=True):
            if not each.over:
                each.note(version.ask(each.rate_rps, STEP_S, seed=step))
    told = {version.side.name: each.p99_ms for version, each in zip(versions, seeking, strict=True)}
    return [each.low_rps for each in seeking], told


class Search:
    """Doubles the rate until it is too high, then halves what lies between the highest good and the lowest bad rate."""

    def __init__(self) -> None:
        self.low_rps, self.high_rps, self._missed = 0.0, math.inf, 0
        self.p99_ms: list[Point] = []

    @property
    def rate_rps(self) -> float:
        """What to try next."""
        if self.high_rps == math.inf:
            return 2 * self.low_rps or LOWEST_RPS
        return math.sqrt((self.low_rps or self.high_rps / 4) * self.high_rps)

    @property
    def over(self) -> bool:
        """Is it known closely enough?"""
        return self.high_rps <= CLOSE * self.low_rps

    def note(self, seen: load.Seen) -> None:
        """Learn what became of that rate: it is too high when it was missed twice, for the machine hiccups."""
        rate_rps = self.rate_rps
        good = set(seen.statuses) == {200}
        self.p99_ms.append((round(rate_rps, 1), round(seen.quantile_ms(0.99), 2) if good else None))
        if good and (seen.latency_s <= WITHIN_S).mean() >= SHARE:
            self.low_rps, self._missed = rate_rps, 0
        elif self._missed:
            self.high_rps, self._missed = rate_rps, 0
        else:
            self._missed = 1


def measured(versions: Sequence[Version], rate_rps: float) -> list[Used]:
    """What each does for the same traffic: medians of some rounds, in turn."""
    rounds = [[version.use(rate_rps, ROUND_S, 100 + turn) for version in versions] for turn in range(ROUNDS)]
    return [Used(*map(statistics.median, zip(*each, strict=True))) for each in zip(*rounds, strict=True)]


def case(limits: Sequence[float], same: Sequence[Used]) -> Iterator[Claim]:
    """The first version against the last."""
    plain, best, without, everything = limits[0], limits[-1], same[0], same[-1]
    gain, faster = best / plain, without.p99_ms / everything.p99_ms
    yield Claim(
        "requests/s within 100 ms", "+433 %", f"{plain:,.0f}", f"{best:,.0f} ({gain - 1:+.0%})", gain, gain >= 5.33
    )
    yield Claim(
        f"P99 (P50) at {plain:,.0f} requests/s", "280 → 65 ms: 4.3 x", _latency(without), _latency(everything),
        faster, faster >= 280 / 65,
    )  # fmt: skip
    old, new = (PRICE / 3600 / rate_rps * 1e6 for rate_rps in (plain, best))
    yield Claim(
        f"cost of a million requests, {PRICE:.2f} an hour", "-67 %", f"{old:.4f}", f"{new:.4f} ({new / old - 1:+.0%})",
        gain, new <= 0.33 * old,
    )  # fmt: skip
    less = without.processor / everything.processor
    yield Claim(
        f"the replicas' processor time at {plain:,.0f} requests/s", "", f"{without.processor:.0%} of a core",
        f"{everything.processor:.0%}", less, less > 1,
    )  # fmt: skip


def _latency(used: Used) -> str:
    return f"{used.p99_ms:.1f} ({used.p50_ms:.1f}) ms"


def ladder(limits: Sequence[float], same: Sequence[Used]) -> Iterator[Claim]:
    """Each version against the one before."""
    steps = list(zip(SIDES, limits, same, strict=True))
    for (_, before_rps, before), (side, rps, used) in pairwise(steps):
        yield Claim(
            f"{side.name}: requests/s within 100 ms; P99 and processor at {limits[0]:,.0f} requests/s", "",
            _told(before_rps, before), _told(rps, used), rps / before_rps, rps > before_rps,
        )  # fmt: skip


def _told(rps: float, used: Used) -> str:
    text = f"{rps:,.0f}; {used.p99_ms:.1f} ms, {used.processor:.0%}, batch {used.batch:.1f}"
    return f"{text}, {used.hits:.0%} cached" if used.hits > 0.01 else text


def plot(p99_ms: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Draw P99 against the rate, a line a version: the first and the last in colour, those between in grey.

    Of a rate that was tried twice the better P99 is drawn, as the search judges it.
    """
    figure, axes = canvas("requests/s offered (open loop)", "P99 (ms)", height=3.9)
    colours = (PALETTE[3], "#b4bfce", "#8291a7", "#475569", PALETTE[2])
    top = 1000.0  # what lies above, or has no P99 because some failed, ends there
    for (name, points), colour in zip(p99_ms.items(), colours, strict=True):
        rates = sorted({rate for rate, _ in points})
        best = [min(top if ms is None else min(ms, top) for at, ms in points if at == rate) for rate in rates]
        wide = 2.2 if colour in PALETTE else 1.3
        axes.plot(rates, best, "o-", color=colour, linewidth=wide, markersize=2 * wide, label=name)
    axes.axhline(1e3 * WITHIN_S, color="#808080", linewidth=0.9, linestyle="--")
    axes.set(xscale="log", yscale="log", ylim=(None, top))
    axes.set_xticks([100, 200, 500, 1000, 2000, 5000], minor=False)
    axes.set_yticks([2, 5, 10, 20, 50, 100, 200, 500, 1000], minor=False)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    main()
