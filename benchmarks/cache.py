"""Answers that are kept: who finds them where, what that saves, and what ill nodes do to users.

    python -m benchmarks.cache [--video-games FILE] [--json FILE]

A replica with the cache and one without it, of the same ranker (50,000 items, random weights, which cost as much as
learned ones), with a real Redis near it and two shared nodes. Users ask by Zipf's law, as many different questions as
there are; both replicas get the same ones at the same moments, in turn. With `--video-games` a second cache sees the
first purchases of that file's users, each a question with the history so far. About two minutes.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks import claims, load, questions
from benchmarks.claims import Claim
from slipway.serving.cache.nodes import PREFIX
from tests.serving import packages
from tests.serving.conftest import Replica
from tests.serving.test_feedback import Store

COMMAND = "python -m benchmarks.cache"
QUESTIONS, CHECKED = 5_000, 200
WARM, WARM_RPS = 10_000, 500.0
RATE_RPS, SECONDS, ROUNDS = 100.0, 6.0, 3
LEVELS = ("memory", "redis", "distributed", "none")


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video-games", type=Path, metavar="FILE", help="text of user and item, a line each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slipway") as name, ExitStack() as stack:
        side = Sides(Path(name), stack)
        rows = [*by_zipf(side), *ill(side)]
        if options.video_games:
            rows.insert(1, replayed(side, options.video_games))
    claims.tell("The cache of one replica", COMMAND, rows, options.json)


class Sides:
    """A replica with the cache and one without, and the cache's Redis servers."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._package = packages.seal(folder / "package", items=questions.ITEMS, width=128)
        self._folder, self._stack = folder, stack
        self.near, *self.shared = [Store(folder / f"{name}.sock") for name in ("near", "one", "two")]
        for store in (self.near, *self.shared):
            stack.callback(store.stop)
        self.without, self.cached = self.replica("without", 0), self.replica("cached", 64)

    def replica(self, name: str, memory_mb: int) -> Replica:
        """Start one more replica, which ends with the benchmark."""
        serve = {"max_batch": 32, "cache": {"memory_mb": memory_mb}}
        nodes = ",".join(str(store.socket) for store in self.shared)
        environment = {"SLIPWAY_REDIS": str(self.near.socket), "SLIPWAY_CACHE": nodes, "SLIPWAY_LOG": "ERROR"}
        made = Replica(self._package, self._folder / name, SLIPWAY_SERVE=json.dumps(serve), **environment)
        self._stack.callback(made.close)
        made.wait_until_ready()
        return made


def asked(replica: Replica, requests: Sequence[bytes], rate_rps: float, seed: int) -> load.Seen:
    """Send each once, at moments drawn by `seed`: the same for whoever is asked."""
    gaps = np.random.default_rng(seed).exponential(1 / rate_rps, size=len(requests))
    return load.open_loop(("127.0.0.1", replica.port), requests, np.cumsum(gaps))


def levels(replica: Replica) -> Counter[str]:
    """Answers so far by the level that they came from."""
    return Counter({at: round(replica.metric(f'slipway_cache_answers_total{{level="{at}"}}')) for at in LEVELS})


def shares(counts: Counter[str]) -> tuple[float, float]:
    """Share of the answers that the cache gave, and of these the share that came from memory."""
    hits = counts["memory"] + counts["redis"] + counts["distributed"]
    return hits / max(counts.total(), 1), counts["memory"] / max(hits, 1)


def by_zipf(sides: Sides) -> Iterator[Claim]:
    """Hits by level and the mean latency, with a warm cache."""
    asked(sides.cached, questions.zipf(WARM, QUESTIONS, 1), WARM_RPS, 1)
    before, means = levels(sides.cached), []
    for turn in range(ROUNDS):
        requests = questions.zipf(round(RATE_RPS * SECONDS), QUESTIONS, 10 + turn)
        pair = [asked(replica, requests, RATE_RPS, turn) for replica in (sides.without, sides.cached)]
        assert all(set(seen.statuses) == {200} for seen in pair), [seen.statuses for seen in pair]
        means.append([float(seen.latency_s.mean()) * 1e3 for seen in pair])
    counts = levels(sides.cached) - before
    hit, in_memory = shares(counts)
    text = f"{hit:.1%} hits, {in_memory:.1%} of them in memory ({dict(counts)})"
    yield Claim("hits in memory, Zipf over 5,000 questions", "90 %", "", text, in_memory / 0.9, in_memory >= 0.9)
    without, cached = (statistics.median(each) for each in zip(*means, strict=True))
    ratio = statistics.median(one / other for one, other in means)
    yield Claim(
        "mean latency, Zipf", "120 → 35 ms: 3.4 x", f"{without:.2f} ms", f"{cached:.2f} ms", ratio, ratio >= 3.4
    )


def replayed(sides: Sides, file: Path) -> Claim:
    """Show how often real users ask the same: only while their histories are short."""
    users: dict[str, list[int]] = {}
    for line in file.read_text().splitlines():
        user, item = line.split()
        users.setdefault(user, []).append(int(item) % questions.ITEMS + 1)
    some = list(islice(users.values(), 6_000))
    # The file has no times: all first purchases, then all second ones.
    histories = [items[:length] for length in (1, 2) for items in some if len(items) >= length]
    cached = sides.replica("replayed", 64)
    requests = [load.post(questions.PATH, questions.body(history)) for history in histories]
    asked(cached, requests, WARM_RPS, 3)
    counts = levels(cached)
    hit, in_memory = shares(counts)
    text = f"{hit:.1%} hits, {in_memory:.1%} of them in memory ({dict(counts)})"
    return Claim(
        "hits in memory, first two purchases of 6,000 users", "90 %", "", text, in_memory / 0.9, in_memory >= 0.9
    )


def ill(sides: Sides) -> Iterator[Claim]:
    """What users of a fresh replica see of a Redis that is stalled, returns rubbish, or is gone."""
    bodies = [questions.body(questions.history(question)) for question in range(QUESTIONS, QUESTIONS + CHECKED)]
    right = [sides.without.post(questions.PATH, body).json["items"] for body in bodies]
    for name in ("stalled", "rubbish", "killed"):
        for body in bodies:
            sides.cached.post(questions.PATH, body)  # so that the nodes hold it
        spoil(sides, name)
        fresh = sides.replica(name, 64)
        requests = questions.zipf(round(RATE_RPS * SECONDS), QUESTIONS, 20)
        plain = asked(sides.without, requests, RATE_RPS, 5)
        seen = asked(fresh, requests, RATE_RPS, 5)
        given = [fresh.post(questions.PATH, body) for body in bodies]
        failed = len(requests) - seen.statuses.get(200, 0) + sum(reply.status != 200 for reply in given)
        wrong = sum(r.status == 200 and not same(r.json["items"], items) for r, items in zip(given, right, strict=True))
        heal(sides, name)
        off, on = plain.quantile_ms(0.99), seen.quantile_ms(0.99)
        yield Claim(
            f"Redis {name}: wrong answers, failed requests, P99",
            "0, 0, within 25 ms of none",
            f"P99 {off:.1f} ms",
            f"{wrong}, {failed}, P99 {on:.1f} ms",
            off / on,
            wrong == failed == 0 and on <= off + 25,
        )


def same(one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> bool:
    """Are these the same scores, though batches of other sizes round otherwise and near ties swap places?"""
    pairs = list(zip(one, other, strict=True))
    return all(abs(a["score"] - b["score"]) <= 1e-3 * max(1.0, abs(b["score"])) for a, b in pairs)


def spoil(sides: Sides, how: str) -> None:
    """Make all nodes ill."""
    for store in (sides.near, *sides.shared):
        if how == "stalled":
            store.process.send_signal(signal.SIGSTOP)
        elif how == "killed":
            store.stop()
        else:
            with store.client() as client:
                for key in client.keys(PREFIX + b"*"):
                    client.set(key, b"slc1rubbish" * 9)


def heal(sides: Sides, how: str) -> None:
    """End what `spoil` began, where it can be ended."""
    for store in (sides.near, *sides.shared):
        if how == "stalled":
            store.process.send_signal(signal.SIGCONT)


if __name__ == "__main__":
    main()
