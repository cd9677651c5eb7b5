"""The model server beside others and under load: `python -m benchmarks.serving --json FILE`, about four minutes.

One small ranker, one engine thread; each server is a process of its own and gets the same requests, in turns.

    cost        processor time a request at saturation (32 clients, closed loop), over the engine alone on such batches,
                and beside a server that does no more than read and write (`bare.py`)
    rates       P99 at 100, 500 and 1,500 requests/s, and requests/s at saturation, beside mosec, LitServe and BentoML
    batching    none, fixed by load (work-conserving), and a window from the arrivals: P99, mean batch, processor share
    goodput     answers within 100 ms at 0.5, 1, 2 and 3 times saturation, of a small model and of one of about 1 ms

`--install` gets the peers from PyPI first. Figures in which the generator lagged by a tenth of the P99 are left out.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import load
from benchmarks.claims import Claim, tell
from benchmarks.serving.sides import PINS, Running, Side, bare, install, ours, peers, requests, running
from slipway.serving import model as models
from tests.serving import packages

SECTIONS = ("cost", "rates", "batching", "goodput")
CLIENTS = 32
WITHIN_S = 0.1


def main() -> None:
    """Measure the sections in turn and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--package", type=Path, help="a ranker's package (default: a small one made now)")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="a section (default: all)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement (default: %(default)s)")
    parser.add_argument("--install", action="store_true", help="get the peers from PyPI")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    options = parser.parse_args()
    if options.install:
        install()
    measures = {"cost": cost, "rates": rates, "batching": batching, "goodput": goodput}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.package or packages.seal(Path(scratch) / "ranker", items=2000, width=64)
        claims = [row for name in options.only or SECTIONS for row in measures[name](folder, options.seconds)]
    tell("Serving: one replica", "python -m benchmarks.serving", claims, options.json)


def cost(folder: Path, seconds: float) -> Iterator[Claim]:
    """Processor time of a request, over the engine's own."""
    sent = requests(folder)
    whole, alone, sizes = [], [], []
    with running(ours(folder), folder, sent[0]) as server:
        for _ in range(3):
            used, size, _ = saturate(server, sent, seconds)
            whole.append(used)
            sizes.append(size)
            alone.append(engine_alone(folder, sent, round(size), seconds / 2))
    us, engine_us = statistics.median(whole), statistics.median(alone)
    yield Claim(
        "processor time a request at saturation, over the engine alone on such batches",
        "at most 1.5 x",
        f"engine alone {engine_us:.0f} µs",
        f"{us:.0f} µs, {us / engine_us:.2f} x, mean batch {statistics.mean(sizes):.0f}",
        engine_us / us,
        us <= 1.5 * engine_us,
    )
    floor_us = bare_us(folder, sent, seconds)
    yield Claim(
        "processor time a request without the engine's, beside that of a server which only reads and writes",
        "the limit is 1 x",
        f"{floor_us:.0f} µs",
        f"{us - engine_us:.0f} µs, {(us - engine_us) / floor_us:.1f} x",
        floor_us / (us - engine_us),
        us - engine_us <= floor_us,
    )


def bare_us(folder: Path, sent: Sequence[bytes], seconds: float) -> float:
    """Processor time of a request (µs) that reaches no engine."""
    with running(bare(), folder, sent[0]) as server:
        used = server.cpu_s()
        answers = load.closed_loop(server.address, sent, CLIENTS, seconds)[200]
        return 1e6 * (server.cpu_s() - used) / answers


def saturate(server: Running, sent: Sequence[bytes], seconds: float) -> tuple[float, float, float]:
    """Keep a server of ours busy: processor time a request (µs), mean batch, requests/s."""
    before, used = server.batches(), server.cpu_s()
    answers = load.closed_loop(server.address, sent, CLIENTS, seconds)[200]
    used = server.cpu_s() - used
    samples, runs = (now - then for now, then in zip(server.batches(), before, strict=True))
    return 1e6 * used / answers, samples / runs, answers / seconds


def engine_alone(folder: Path, sent: Sequence[bytes], size: int, seconds: float) -> float:
    """Processor time of a sample (µs) where nothing but the engine runs, on ready-made batches."""
    model = models.load(folder, "1", threads=1)
    queries = [model.endpoint.decode(request.partition(b"\r\n\r\n")[2]) for request in sent]
    feeds = [model.endpoint.collate(queries[i : i + size]) for i in range(0, len(queries) - size + 1, size)]
    began, used, samples = time.monotonic(), time.process_time(), 0
    for feed in itertools.cycle(feeds):
        model.engine.run(feed, model.endpoint.outputs)
        samples += size
        if time.monotonic() - began > seconds:
            return 1e6 * (time.process_time() - used) / samples
    raise AssertionError("a cycle has no end")


def rates(folder: Path, seconds: float) -> Iterator[Claim]:
    """Throughput and P99 beside others."""
    found = {side.name: _rates(side, folder, seconds) for side in (ours(folder), *peers())}
    (best, p99s) = found.pop("slipway")
    wanted = {"mosec": 1.0, "LitServe": 8.0, "BentoML": 8.0}
    for name in PINS:
        claim, published = f"requests/s at saturation, beside {name}", f"at least {wanted[name]:.0f} x"
        if name not in found:
            yield Claim(claim, published, "not installed (--install)", f"{best:,.0f}", math.nan, False)
            continue
        rate, _ = found[name]
        reached = best >= wanted[name] * rate
        yield Claim(claim, published, f"{rate:,.0f}", f"{best:,.0f}", best / max(rate, 1e-9), reached)
    for rate_rps, p99_ms in p99s.items():
        others = {name: p99[rate_rps] for name, (_, p99) in found.items()}
        told = ", ".join(f"{name} {_ms(value)}" for name, value in others.items()) or "none installed"
        least = min((value for value in others.values() if value), default=None)
        ratio = least / p99_ms if least and p99_ms else math.nan
        yield Claim(f"P99 at {rate_rps} requests/s", "", told, _ms(p99_ms), ratio, ratio >= 1)


def _ms(value: float | None) -> str:
    return "lagged" if value is None else "over 5 s" if value == math.inf else f"{value:.1f} ms"


def _rates(side: Side, folder: Path, seconds: float) -> tuple[float, dict[int, float | None]]:
    sent = requests(folder, wrapped=side.name == "BentoML")
    with running(side, folder, sent[0]) as server:
        load.closed_loop(server.address, sent, CLIENTS, 0.5)
        answers = load.closed_loop(server.address, sent, CLIENTS, seconds)[200]
        p99s = {rate: p99_ms(server, sent, rate, seconds) for rate in (100, 500, 1500)}
    return answers / seconds, p99s


def p99_ms(server: Running, sent: Sequence[bytes], rate_rps: float, seconds: float) -> float | None:
    """P99 in an open loop; nothing where the generator lagged, three times over."""
    for seed in range(3):
        seen = load.open_loop(server.address, sent, load.poisson(rate_rps, seconds, seed))
        try:
            return seen.check().quantile_ms(0.99)
        except load.LagError:
            continue
    return None


def batching(folder: Path, seconds: float) -> Iterator[Claim]:
    """No batching and a window against the work-conserving default."""
    sent = requests(folder)
    sides = {
        "none": ours(folder, max_batch=1),
        "work-conserving": ours(folder),
        "window": ours(folder, max_wait_ms=4.0),
    }
    found: dict[str, dict[str, tuple[str, float, float]]] = {name: {} for name in sides}
    for name, side in sides.items():
        with running(side, folder, sent[0]) as server:
            for label, due_s in {
                "300 requests/s": load.poisson(300, seconds),
                "1,500 requests/s": load.poisson(1500, seconds),
                "3,000 requests/s": load.poisson(3000, seconds),
                "bursts of 32, 1,000 requests/s": load.bursts(1000, 32, seconds),
            }.items():
                before, used = server.batches(), server.cpu_s()
                seen = load.open_loop(server.address, sent, due_s)
                share = (server.cpu_s() - used) / seconds
                samples, runs = (now - then for now, then in zip(server.batches(), before, strict=True))
                p50, p99 = seen.quantile_ms(0.5), seen.quantile_ms(0.99)
                text = f"P50 {p50:.1f}, P99 {p99:.1f} ms, batch {samples / runs:.1f}, processor {share:.0%}"
                found[name][label] = (text, p99, share)
    for label in found["none"]:
        none, conserving, window = (found[name][label] for name in sides)
        yield Claim(
            f"batching as the engine is free against none, {label}", "", none[0], conserving[0],
            none[1] / conserving[1], conserving[1] <= none[1],
        )  # fmt: skip
        yield Claim(
            f"window from the arrivals, processor against work-conserving, {label}", "", conserving[0], window[0],
            conserving[2] / window[2], window[2] <= conserving[2],
        )  # fmt: skip


def goodput(small: Path, seconds: float) -> Iterator[Claim]:
    """Answers within 100 ms, from half of saturation to three times, replica and generator on a processor each."""
    mine, (first, *others) = os.sched_getaffinity(0), sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        larger = packages.seal(Path(scratch) / "ranker", items=20_000, width=128)
        os.sched_setaffinity(0, others or mine)
        try:
            for folder in (small, larger):
                yield _goodput(folder, first, seconds)
        finally:
            os.sched_setaffinity(0, mine)


def _goodput(folder: Path, core: int, seconds: float) -> Claim:
    sent = requests(folder)
    engine_us = engine_alone(folder, sent, CLIENTS, seconds / 4)
    with running(ours(folder, deadline_ms=0), folder, sent[0], core) as server:
        load.closed_loop(server.address, sent, CLIENTS, 0.5)
        _, _, saturation_rps = saturate(server, sent, seconds)
    good: dict[float, float] = {}
    statuses: Counter[int] = Counter()
    with running(ours(folder, deadline_ms=0.8e3 * WITHIN_S), folder, sent[0], core) as server:
        load.closed_loop(server.address, sent, 1, 0.5)
        for times in (0.5, 1.0, 2.0, 3.0):
            seen = load.open_loop(server.address, sent, load.poisson(times * saturation_rps, seconds))
            good[times] = seen.good_rps(WITHIN_S)
            statuses += Counter(seen.statuses)
            time.sleep(1)  # what was left behind is done
    told = ", ".join(f"{times:g} x: {rate:,.0f}" for times, rate in good.items())
    others = ", ".join(f"{status or 'no answer'}: {count:,}" for status, count in sorted(statuses.items()))
    ratio = good[3.0] / max(good.values())
    return Claim(
        f"answers/s within 100 ms at 0.5 to 3 times saturation, engine {engine_us:.0f} µs a request", "flat",
        f"saturation {saturation_rps:,.0f}", f"{told} ({others})", ratio, ratio >= 0.9,
    )  # fmt: skip


if __name__ == "__main__":
    main()
