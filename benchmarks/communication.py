"""Gradients over a slow link: two nodes of two processes, through the product's own training and launchers.

    python -m benchmarks.communication [--source PATH/TO/video_games.txt] [--json FILE] [--part links|metric]

A node is a network namespace; a veth pair between the two is shaped to 100 Mbit/s and 1 Gbit/s on both ends (tc tbf),
and left as it is for a third time. Bytes are those that the kernel counted on the interface. Needs root, `ip` and `tc`.

What a method costs in quality is measured without the link, with the same map of nodes: its arithmetic is the same. The
validation metric of runs as params.yaml tells them is compared over four seeds, each with itself, on the source, or the
embedded data.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np

from benchmarks import ranker
from benchmarks.claims import Claim, tell
from slipway import config
from slipway.params import CommunicationParams, TrainParams
from slipway.training import communication, loop, order, processes, rendezvous, trainer
from slipway.workloads.base import Tensors
from slipway.workloads.ranker.ingest import ingest
from slipway.workloads.ranker.params import RankerParams

METHODS = ("flat", "hierarchical", "powersgd", "hierarchical_powersgd")
OURS = "hierarchical_powersgd"
LINKS: dict[str, str | None] = {"100 Mbit/s": "100mbit", "1 Gbit/s": "1gbit", "unshaped": None}
NODES, EACH = 2, 2
WORLD = NODES * EACH
ROUNDS = 2
STEPS, SKIPPED = 16, 4  # of a timed run; the first open connections, and are not compressed
ITEMS, BATCH, WIDTH = 16_000, 32, 128  # of a timed run: 2.3 million parameters
SEEDS = (1, 2, 3, 4)


def synthetic(folder: Path, users: int, items: int, length: int) -> Path:
    """Write sequences in which four of five items follow from the one before, by a fixed random rule."""
    rng = np.random.default_rng(7)
    follows, rows = rng.permutation(items), np.empty((users, length), np.int64)
    rows[:, 0] = rng.integers(0, items, users)
    for t in range(1, length):
        rows[:, t] = np.where(rng.random(users) < 0.8, follows[rows[:, t - 1]], rng.integers(0, items, users))
    lines = [f"{user} {item}" for user, row in enumerate(rows + 1) for item in row]
    source = folder.with_suffix(".txt")
    source.write_text("\n".join(lines) + "\n")
    ranker.ingest(source, folder)
    return folder


@contextlib.contextmanager
def nodes(rate: str | None) -> Iterator[tuple[list[str], str]]:
    """Make two namespaces with a link of `rate` between them; gives their names and the first one's address."""
    names, ends = [f"slipway-{os.getpid()}-{i}" for i in range(NODES)], ["node0", "node1"]

    def run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)

    try:
        for name in names:
            run("ip", "netns", "add", name)
        run("ip", "-n", names[0], "link", "add", ends[0], "type", "veth", "peer", ends[1], "netns", names[1])
        for i, (name, end) in enumerate(zip(names, ends, strict=True)):
            run("ip", "-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", end)
            run("ip", "-n", name, "link", "set", end, "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
            if rate is not None:
                shape = ("rate", rate, "burst", "256kb", "latency", "100ms")
                run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", end, "root", "tbf", *shape)
        yield names, "10.77.0.1"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def job(folder: Path, data: Path, method: str) -> loop.Job:
    """Make a timed run of four processes at ZeRO 0."""
    told = CommunicationParams.model_validate({"method": method, "warmup_steps": 2})
    settings = {"epochs": 1, "batch_size": BATCH, "world_size": WORLD, "zero": 0, "checkpoint_every_s": 1e6}
    train = TrainParams.model_validate({"communication": told, **settings})
    model = RankerParams(width=WIDTH, max_length=20, negatives=256)
    return loop.Job("ranker", data, train, model, folder / "checkpoints", folder / "out")


class Measured(trainer.Trainer):
    """The product's loop, with the time and the interface's counter after each step."""

    def __init__(self, rank: int, world: int, meeting: str, told: loop.Job) -> None:
        super().__init__(rank, world, meeting, told)
        self.interface = Path(f"/sys/class/net/node{os.environ['GROUP_RANK']}/statistics/tx_bytes")
        self.seen = list[tuple[float, int]]()

    def _step(self, batch: Tensors, turn: order.Turn, done: float) -> None:
        super()._step(batch, turn, done)
        self.seen.append((time.perf_counter(), int(self.interface.read_text())))

    def result(self) -> dict[str, Any]:
        """Median time of a step, bytes that this node sent in a step, and what `auto` found."""
        times, sent = zip(*self.seen[SKIPPED:], strict=True)
        found = {"step_s": median(np.diff(times)), "sent_bytes": (sent[-1] - sent[0]) / (len(sent) - 1)}
        if isinstance(self.reducer, communication.Reducer) and self.reducer.trial.seconds:
            rest, plain, compressed = (median(column) for column in zip(*self.reducer.trial.seconds, strict=True))
            found |= {"compresses": self.reducer.compresses, "plain_s": rest + plain, "compressed_s": rest + compressed}
        return found


def measured(rank: int, world: int, meeting: str, jobs: Sequence[tuple[str, loop.Job]]) -> list[dict[str, Any]]:
    """Run all jobs, as one process; what it measured of each."""
    found = []
    for method, told in jobs:
        one = Measured(rank, world, meeting, told)
        one.run()
        found.append({"method": method, **one.result()})
    return found


def worker(told: Path) -> None:
    """Be the launcher of one node, which leaves what its first process measured."""
    node = rendezvous.here()
    with rendezvous.meet(node, WORLD) as team:
        found = processes.run(WORLD, measured, pickle.loads(told.read_bytes()), team=team)
    told.with_name(f"found-{node.rank}.json").write_text(json.dumps(found))


def timed(folder: Path, rate: str | None) -> dict[str, dict[str, Any]]:
    """Run every method, in turns, over one link: by method the median step time, and bytes between nodes a step."""
    folder.mkdir()
    users = STEPS * WORLD * BATCH
    data = synthetic(folder / "data", users, ITEMS, 20)
    jobs = [(method, job(folder, data, method)) for _ in range(ROUNDS) for method in METHODS]
    jobs.append(("auto", job(folder, data, "auto")))
    (folder / "jobs").write_bytes(pickle.dumps(jobs))
    with nodes(rate) as (names, address):
        ranks = [_launch(folder, name, i, address) for i, name in enumerate(names)]
        try:
            codes = [rank.wait(280) for rank in ranks]
        finally:
            for rank in ranks:
                rank.terminate()
    if any(codes):
        sys.exit(f"benchmark: a launcher failed:\n{(folder / 'log-0').read_text()[-4000:]}")
    sides = [json.loads((folder / f"found-{i}.json").read_text()) for i in range(NODES)]
    found: dict[str, dict[str, Any]] = {}
    for method in (*METHODS, "auto"):
        both = [(a, b) for a, b in zip(*sides, strict=True) if a["method"] == method]
        step, sent = mean(a["step_s"] for a, _ in both), mean(a["sent_bytes"] + b["sent_bytes"] for a, b in both)
        found[method] = {**both[0][0], "step_s": step, "sent_bytes": sent, "samples_per_s": WORLD * BATCH / step}
    return found


def _launch(folder: Path, name: str, node: int, address: str) -> subprocess.Popen[bytes]:
    variables = {"NNODES": str(NODES), "NODE_RANK": str(node), "MASTER_ADDR": address, "MASTER_PORT": "29400"}
    worker = [sys.executable, "-m", "benchmarks.communication", "--worker", str(folder / "jobs")]
    with (folder / f"log-{node}").open("wb") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", name, *worker], stdout=log, stderr=log, env={**os.environ, **variables}
        )


def simulated(rank: int, world: int, meeting: str, told: loop.Job) -> float:
    """Train as one of two nodes, told so by the environment; the metric of the epoch that is kept."""
    os.environ.update(GROUP_RANK=str(rank // EACH), LOCAL_RANK=str(rank % EACH), LOCAL_WORLD_SIZE=str(EACH))
    return trainer.run(rank, world, meeting, told, None, processes.Held(0)).best.metric


def quality(folder: Path, source: Path | None) -> dict[str, list[float]]:
    """Train as params.yaml says with flat and with ours, from each seed: by method the metrics."""
    params, data = config.load(), folder / "data"
    folder.mkdir()
    if source is None:
        ingest(params, data, {})
    else:
        ranker.ingest(source, data)
    found: dict[str, list[float]] = {method: [] for method in ("flat", OURS)}
    batch = params.train.batch_size * params.train.world_size // WORLD
    for seed in SEEDS:
        for method, metrics in found.items():
            told = CommunicationParams.model_validate({"method": method})
            turned = {"seed": seed, "communication": told, "world_size": WORLD, "zero": 0, "batch_size": batch}
            train = params.train.model_copy(update={**turned, "checkpoint_every_s": 1e6})
            each = loop.Job("ranker", data, train, params.model, folder / "checkpoints", folder / "out")
            metrics.append(processes.run(WORLD, simulated, each))
            shutil.rmtree(each.out)
            print(f"seed {seed}, {method}: {metrics[-1]:.4f}", flush=True)
    return found


@dataclass(frozen=True)
class Result:
    """All that was measured."""

    links: dict[str, dict[str, dict[str, Any]]]
    """By link, then by method."""
    metric: dict[str, list[float]]
    """By method, one a seed."""


def claims(result: Result) -> list[Claim]:
    """Hold what was measured against what was published."""
    rows = []
    if result.links:
        flat, ours, fast = *(result.links["100 Mbit/s"][method] for method in ("flat", OURS)), result.links["1 Gbit/s"]
        sent = [side["sent_bytes"] / 1e6 for side in (flat, ours)]
        ratio, name = sent[0] / sent[1], "bytes between nodes a step, on the interface"
        rows = [
            Claim(name, "1/16", f"{sent[0]:.2f} MB", f"{sent[1]:.3f} MB", ratio, ratio >= 16),
            _speed("100 Mbit/s", "1.4 x", flat, ours, 1.4),
            _speed("1 Gbit/s", "none; no slower", fast["flat"], fast[OURS], 1.0),
        ]
    if result.metric:
        base, kept = result.metric["flat"], result.metric[OURS]
        ratio, found = mean(kept) / mean(base), f"{_each(kept)}; {paired(base, kept)}"
        rows.append(Claim(f"NDCG@10, {len(base)} seeds", "within 0.5 %", _each(base), found, ratio, ratio >= 0.995))
    return rows + [_auto(name, methods["auto"], methods) for name, methods in result.links.items()]


def _each(values: Sequence[float]) -> str:
    return f"{mean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})"


def paired(base: Sequence[float], other: Sequence[float]) -> str:
    """Tell the mean relative difference of runs from equal seeds, with its standard error."""
    gains = [b / a - 1 for a, b in zip(base, other, strict=True)]
    return f"{mean(gains):+.2%} ± {stdev(gains) / math.sqrt(len(gains)):.2%}"


def _speed(link: str, wanted: str, flat: dict[str, Any], ours: dict[str, Any], least: float) -> Claim:
    base, other = (f"{side['samples_per_s']:.0f} ({1e3 * side['step_s']:.0f} ms a step)" for side in (flat, ours))
    ratio = flat["step_s"] / ours["step_s"]
    return Claim(f"samples/s over {link}, four processes", wanted, base, other, ratio, ratio >= least)


def _auto(link: str, auto: dict[str, Any], methods: dict[str, dict[str, Any]]) -> Claim:
    """`auto` is right if it chose the method that was quicker in the same run."""
    gain = methods["hierarchical"]["step_s"] / methods[OURS]["step_s"]
    chose = f"{'on' if auto['compresses'] else 'off'}: tried {1e3 * auto['compressed_s']:.0f} ms"
    best = "on" if gain >= 1.1 else "off"
    told = f"{1e3 * auto['plain_s']:.0f} ms; measured gain {gain:.2f}"
    return Claim(f"auto over {link}: compression", f"{best}, by the gain", told, chose, gain, chose.startswith(best))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the links, the metric, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="`user item` a line, in time order, such as video_games.txt")
    parser.add_argument("--json", type=Path, help="write the result here; a part left out stays as it stands there")
    parser.add_argument("--part", choices=("links", "metric"), help="measure this alone; both: about 20 minutes")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        worker(options.worker)
        return
    found = json.loads(options.json.read_text()) if options.json is not None and options.json.exists() else {}
    with tempfile.TemporaryDirectory(prefix="slipway-communication-") as temporary:
        if options.part != "metric":
            found["links"] = _links(Path(temporary))
        if options.part != "links":
            found["metric"] = quality(Path(temporary) / "quality", options.source)
    command = "python -m benchmarks.communication" + (f" --source {options.source.name}" if options.source else "")
    tell("Communication", command, claims(Result(found.get("links", {}), found.get("metric", {}))), options.json)
    if options.json is not None:
        options.json.write_text(json.dumps(found | json.loads(options.json.read_text()), indent=2) + "\n")


def _links(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
        sys.exit("benchmark skipped: network namespaces need root, and the programs ip and tc (iproute2)")
    links = {name: timed(folder / str(i), rate) for i, (name, rate) in enumerate(LINKS.items())}
    for name, methods in links.items():
        for method, side in methods.items():
            print(f"{name:11} {method:22} {1e3 * side['step_s']:8.1f} ms {side['sent_bytes'] / 1e6:8.3f} MB a step")
    return links


if __name__ == "__main__":
    main()
