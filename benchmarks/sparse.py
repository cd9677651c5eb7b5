"""Top-K sparse training: what it saves of a step, of the optimizer's memory and of the traffic, and what it costs.

    python -m benchmarks.sparse [--json FILE] [--part steps|metric]

Trains the ranker, 4 blocks of width 256, on its embedded data. The time of a step is measured in one process of one
thread: dense training and every setting take turns on the same batch, all past their warm-up. A setting's time is the
median in each period of its freezing, and the mean of those; the first two steps of a period, which select rows and
find out what is frozen, are left out (2 of 200 as params.yaml has it). Compute is counted by torch, forward and
backward. Traffic is what one of two processes sends.

The metric is that of whole runs from each seed: dense, and sparse after a warm-up that is dense for 60 % of the steps.
Takes about 25 minutes on 2 quiet cores, nearly all of it for the metric.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.claims import Claim, tell
from benchmarks.communication import paired
from slipway import config
from slipway.config import TrainParams
from slipway.training import loop, order, processes, trainer, watch
from slipway.workloads.ranker.ingest import ingest
from slipway.workloads.ranker.params import RankerParams

RESULT = Path(__file__).parent / "results" / "sparse.json"
MODEL = RankerParams(width=256, blocks=4)
BATCH, EPOCHS, SEEDS = 64, 6, (1, 2, 3)
PERIODS = 4  # of freezing: none to three of four blocks
STEPS, SKIPPED = 9, 2  # of a timed period; the first select and settle, and one is counted
PUBLISHED = 85 / 120
Turned = Mapping[str, Any]
DENSE, ROWS, OURS, TABLES = "dense", "share .3", "share .3, freeze .75", "share .3, freeze .75, tables"
SETTINGS: dict[str, Turned] = {
    DENSE: {},
    ROWS: {"share": 0.3},
    "freeze .75": {"freeze": 0.75},
    "share .1, freeze .75": {"share": 0.1, "freeze": 0.75},
    OURS: {"share": 0.3, "freeze": 0.75},
    "share .5, freeze .75": {"share": 0.5, "freeze": 0.75},
    TABLES: {"share": 0.3, "freeze": 0.75, "tables": True},
}
WARMUP = 0.6  # share of the steps that are dense
JUDGED = (OURS, ROWS)  # settings that are trained to the end


@dataclass(frozen=True)
class Step:
    """What a setting does in a step, in the mean over the periods of its freezing."""

    ms: float
    operations: float
    """Of forward and backward."""
    optimizer_bytes: int
    sent_bytes: float = 0.0


def job(folder: Path, data: Path, sparse: Turned, **turned: Any) -> loop.Job:
    """Make a run at ZeRO 0, of one process if not told otherwise."""
    settings = {"epochs": EPOCHS, "batch_size": BATCH, "world_size": 1, "zero": 0, "checkpoint_every_s": 1e6}
    train = TrainParams.model_validate({**settings, "sparse": sparse, **turned})
    return loop.Job("ranker", data, train, MODEL, folder / "checkpoints", folder / "out")


class Stepped(trainer.Trainer):
    """The product's loop, one step at a time, always on the longest of the first batches."""

    def __init__(self, rank: int, world: int, meeting: str, told: loop.Job) -> None:
        super().__init__(rank, world, meeting, told)
        self.torch.set_num_threads(1)
        batches = self.task.epoch(0, world)
        self.turns = list(order.turns(len(batches), 0, rank, world))
        self.batch = max((batches[i] for i in range(40)), key=lambda batch: batch["history_BT"].size)

    def step(self) -> float:
        """Take a step; seconds that it took."""
        began = time.perf_counter()
        self._step(self.batch, self.turns[self.state.step], 0.5)
        return time.perf_counter() - began


def timed(rank: int, world: int, meeting: str, folder: Path, data: Path) -> dict[str, Step]:
    """Take steps in every setting, in turns."""
    from torch.utils.flop_counter import FlopCounterMode

    told = {name: {"warmup_steps": 0, "reselect_every": STEPS, **each} for name, each in SETTINGS.items()}
    runs = {name: Stepped(rank, world, meeting, job(folder / name, data, each)) for name, each in told.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    operations = dict.fromkeys(runs, 0)
    for _ in range(PERIODS):
        for run in runs.values():
            run.step()
        for name, run in runs.items():
            with FlopCounterMode(display=False) as counter:
                run.step()
            operations[name] += counter.get_total_flops()
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(STEPS - SKIPPED):
            for name, run in runs.items():
                taken[name].append(run.step())
        for name, period in taken.items():
            seconds[name].append(median(period))
    return {
        name: Step(
            1e3 * mean(seconds[name]), operations[name] / PERIODS, run.tool.state_bytes(run.engine).device.optimizer
        )
        for name, run in runs.items()
    }


def sent(rank: int, world: int, meeting: str, told: loop.Job, steps: int) -> float:
    """Take steps in two processes, each on a node of its own; bytes that one sends in a step, after the first two."""
    os.environ.update(GROUP_RANK=str(rank), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")  # each is a node
    run = Stepped(rank, world, meeting, told)
    for _ in range(2):
        run.step()
    before = watch.sent_bytes()
    for _ in range(steps):
        run.step()
    return (watch.sent_bytes() - before) / steps


def traffic(folder: Path, data: Path) -> dict[str, float]:
    """Bytes that a process of two sends in a step, by setting, and of ours with PowerSGD."""
    compressed = {"communication": {"method": "powersgd", "warmup_steps": 2}}
    told: dict[str, tuple[Turned, Turned]] = {name: (each, {}) for name, each in SETTINGS.items()}
    told |= {"powersgd": ({}, compressed), f"{OURS}, powersgd": (SETTINGS[OURS], compressed)}
    return {
        name: processes.run(
            2,
            sent,
            job(folder / name, data, {"warmup_steps": 2, "reselect_every": 3, **each}, world_size=2, **turned),
            3 * PERIODS,
        )
        for name, (each, turned) in told.items()
    }


def trained(rank: int, world: int, meeting: str, told: loop.Job) -> float:
    """Train as the product does, on one thread; the metric of the epoch that is kept."""
    run = trainer.Trainer(rank, world, meeting, told)
    run.torch.set_num_threads(1)
    return run.run().best.metric


def quality(folder: Path, data: Path, steps: int) -> dict[str, list[float]]:
    """Train dense and sparse, from every seed, as many seeds at once as there are cores."""
    warmup = round(WARMUP * steps)
    # Each depth of freezing comes four times in what is left after the warm-up.
    told = {"warmup_steps": warmup, "reselect_every": max(1, (steps - warmup) // (4 * PERIODS))}

    def seed(number: int) -> dict[str, float]:
        found = {}
        for name in (DENSE, *JUDGED):
            sparse = {} if name == DENSE else {**SETTINGS[name], **told}
            place = folder / f"{number}-{name}"
            found[name] = processes.run(1, trained, job(place, data, sparse, seed=number))
            shutil.rmtree(place)
            print(f"seed {number}, {name}: {found[name]:.4f}", flush=True)
        return found

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        each = list(pool.map(seed, SEEDS))
    return {name: [found[name] for found in each] for name in (DENSE, *JUDGED)}


def claims(steps: Mapping[str, Step], metric: Mapping[str, list[float]]) -> list[Claim]:
    """Hold what was measured against what was published."""
    return (_saved(steps) if steps else []) + (_cost(metric) if metric else []) + (_whole(steps) if steps else [])


def _saved(steps: Mapping[str, Step]) -> list[Claim]:
    dense, ours = steps[DENSE], steps[OURS]
    rows = []
    for name in sorted(set(steps) & set(SETTINGS) - {DENSE}, key=lambda name: (name != OURS, steps[name].ms)):
        one = steps[name]
        ratio = dense.ms / one.ms
        told = f"{one.ms:.0f} ms: {one.ms / dense.ms:.2f} x"
        reached = one.ms / dense.ms <= PUBLISHED
        rows.append(Claim(f"sparse step: {name}", "120 -> 85 ms: 0.71 x", f"{dense.ms:.0f} ms", told, ratio, reached))
    share = ours.operations / dense.operations
    told = f"{ours.operations / 1e9:.1f} billion: {share - 1:+.0%}"
    base = f"{dense.operations / 1e9:.1f} billion"
    rows.insert(1, Claim(f"operations of a step: {OURS}", "-30 %", base, told, 1 / share, share <= 0.7))
    for name in (OURS, TABLES):
        size, whole = steps[name].optimizer_bytes / 1e6, dense.optimizer_bytes / 1e6
        wanted = "30 %" if name == TABLES else "none"
        rows.append(
            Claim(
                f"optimizer state: {name}",
                wanted,
                f"{whole:.1f} MB",
                f"{size:.1f} MB: {size / whole:.0%}",
                whole / size,
                name != TABLES or size / whole <= 0.31,
            )
        )
    for name in (OURS, TABLES, f"{OURS}, powersgd"):
        base = "powersgd" if name.endswith("powersgd") else DENSE
        size, whole = steps[name].sent_bytes / 1e6, steps[base].sent_bytes / 1e6
        claim = f"sent by one of two processes a step: {name}"
        told = f"{size:.2f} MB: {size / whole:.0%}"
        rows.append(Claim(claim, "none", f"{whole:.2f} MB ({base})", told, whole / size, size < whole))
    return rows


def _cost(metric: Mapping[str, list[float]]) -> list[Claim]:
    rows = []
    for name in JUDGED:
        kept = metric.get(name, [])
        base = metric[DENSE][: len(kept)]
        if kept:
            ratio, claim = mean(kept) / mean(base), f"NDCG@10, {len(kept)} seeds, dense for {WARMUP:.0%}, then {name}"
            told = f"{mean(kept):.4f}" + (f"; {paired(base, kept)}" if len(kept) > 1 else "")
            rows.append(Claim(claim, "within 1 %", f"{mean(base):.4f}", told, ratio, ratio >= 0.99))
    return rows


def _whole(steps: Mapping[str, Step]) -> list[Claim]:
    whole = WARMUP + (1 - WARMUP) * steps[OURS].ms / steps[DENSE].ms
    claim = f"time of a whole run, dense for {WARMUP:.0%} (from its steps): {OURS}"
    return [Claim(claim, "0.71 x", "1", f"{whole:.2f} x", 1 / whole, whole <= PUBLISHED)]


def _steps(folder: Path, data: Path) -> dict[str, Step]:
    found: dict[str, Step] = processes.run(1, timed, folder / "timed", data)
    for name, size in traffic(folder / "traffic", data).items():
        one = found.get(name, Step(0, 0, 0))
        found[name] = Step(one.ms, one.operations, one.optimizer_bytes, size)
        print(
            f"{name:32} {one.ms:6.1f} ms {one.operations / 1e9:6.2f} billion operations, optimizer "
            f"{one.optimizer_bytes / 1e6:5.1f} MB, sends {size / 1e6:6.2f} MB a step"
        )
    return found


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULT, help="a part left out stays as it stands there")
    parser.add_argument("--part", choices=("steps", "metric"), help="measure this alone")
    options = parser.parse_args()
    found = json.loads(options.json.read_text()) if options.json.exists() else {}
    steps, metric = {name: Step(**each) for name, each in found.get("steps", {}).items()}, found.get("metric", {})
    with tempfile.TemporaryDirectory(prefix="slipway-sparse-") as temporary:
        folder, data = Path(temporary), Path(temporary) / "data"
        ingest(config.load(), data, {})
        if options.part != "metric":
            steps = _steps(folder, data)
        if options.part != "steps":
            told = job(folder, data, {})
            batches = processes.run(1, _batches, told)
            metric = quality(folder, data, EPOCHS * batches)
    tell("Top-K sparse training", "python -m benchmarks.sparse", claims(steps, metric), options.json)
    saved = json.loads(options.json.read_text())
    saved |= {"steps": {name: asdict(each) for name, each in steps.items()}, "metric": metric}
    options.json.write_text(json.dumps(saved, indent=2) + "\n")


def _batches(rank: int, world: int, meeting: str, told: loop.Job) -> int:
    return len(Stepped(rank, world, meeting, told).turns)


if __name__ == "__main__":
    main()
