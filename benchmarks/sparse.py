"""Top-K sparse training: what it saves of a step, of the optimizer's memory and of the traffic, and what it costs.

    python -m benchmarks.sparse [--json FILE] [--model ranker|llm|llm-tenth|llm-128] [--part steps|traffic|metric]

Trains on the workloads' embedded data: the ranker, 4 blocks of width 256, the llm, 6 layers of it, and half as wide.
The time of a step is measured in one process of one thread: dense training and every setting take turns on the same
batch (the largest of the first ones: of the ranker, full histories), all past their warm-up. A setting's time is the
median in each period of its freezing, and the mean of those; the first two steps of a period, which select rows and
find out what is frozen, are left out (2 of 200 as params.yaml has it). Compute is counted by torch, forward and
backward. Traffic is what one of two processes sends.

The metric is that of whole runs from each seed. Their last part is trained densely and with a
setting, from one checkpoint: a run that goes on from a checkpoint ends with the same weights as one from the start.
"stopped" is the best before that part.

On 2 quiet cores the steps take 4 to 6 minutes a model; how long the metric takes was not timed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.claims import Claim, tell
from benchmarks.communication import paired
from slipway import config
from slipway.params import Section, TrainParams
from slipway.training import checkpoints, loop, order, processes, trainer, watch
from slipway.workloads import base
from slipway.workloads.llm.params import LlmParams
from slipway.workloads.ranker.params import RankerParams

RESULT = Path(__file__).parent / "results" / "sparse.json"
SEEDS = (1, 2, 3)
PERIODS = 12  # whole turns of freezing, whose depth goes up to 1, 2, 3 or 5 blocks
STEPS, SKIPPED = 5, 2  # of a timed period; the first select and settle, and one is counted
PUBLISHED = 85 / 120
Turned = Mapping[str, Any]
DENSE, STOPPED, ROWS, OURS, HALF, TABLES = (
    "dense",
    "stopped",
    "share .3",
    "share .3, freeze .9",
    "share .5, freeze .9",
    "share .3, freeze .9, tables",
)
SETTINGS: dict[str, Turned] = {
    DENSE: {},
    "share .7": {"share": 0.7},
    "share .5": {"share": 0.5},
    ROWS: {"share": 0.3},
    "share .1": {"share": 0.1},
    "freeze .9": {"freeze": 0.9},
    "share .7, freeze .9": {"share": 0.7, "freeze": 0.9},
    HALF: {"share": 0.5, "freeze": 0.9},
    OURS: {"share": 0.3, "freeze": 0.9},
    "share .1, freeze .9": {"share": 0.1, "freeze": 0.9},
    "share .1, freeze .5": {"share": 0.1, "freeze": 0.5},
    TABLES: {"share": 0.3, "freeze": 0.9, "tables": True},
}
SENT = (DENSE, ROWS, OURS, TABLES)  # settings whose traffic is counted


def llm(width: int, epoch_tokens: int) -> LlmParams:
    """Make the sizes of 6 layers."""
    heads = {"head_width": width // 4, "q_lora_rank": 3 * width // 8, "kv_lora_rank": width // 4}
    inner = {"dense_width": 3 * width, "expert_width": width}
    return LlmParams.model_validate({"layers": 6, "width": width, **heads, **inner, "epoch_tokens": epoch_tokens})


@dataclass(frozen=True)
class Case:
    """A model, and how its metric is taken."""

    workload: str
    model: Section
    batch: int
    metric: str
    epochs: int
    warmup: float
    """Share of the steps that are dense: a whole number of epochs."""
    periods: int
    """Of freezing, in what is left."""
    judged: tuple[str, ...]
    """Settings that are trained."""
    timed: tuple[str, ...] = tuple(SETTINGS)
    """Settings whose steps are timed."""


CASES = {
    "ranker": Case("ranker", RankerParams(width=256, blocks=4), 64, "NDCG@10", 16, 0.75, 16, (OURS, ROWS)),
    "llm": Case("llm", llm(256, 49_152), 16, "perplexity", 8, 0.75, 16, (OURS, ROWS)),
    "llm-tenth": Case("llm", llm(256, 40_960), 16, "perplexity", 10, 0.9, 12, (HALF,), (DENSE, HALF)),
    "llm-128": Case("llm", llm(128, 40_960), 16, "perplexity", 10, 0.9, 12, (HALF,), (DENSE, HALF)),
}


@dataclass(frozen=True)
class Step:
    """What a setting does in a step, in the mean over the periods of its freezing."""

    ms: float
    operations: float
    """Of forward and backward."""
    optimizer_bytes: int


def job(name: str, folder: Path, data: Path, sparse: Turned, **turned: Any) -> loop.Job:
    """Make a run at ZeRO 0, of one process if not told otherwise."""
    case = CASES[name]
    settings = {"epochs": case.epochs, "batch_size": case.batch, "world_size": 1, "zero": 0, "checkpoint_every_s": 1e6}
    train = TrainParams.model_validate({**settings, "sparse": sparse, **turned})
    return loop.Job(case.workload, data, train, case.model, folder / "checkpoints", folder / "out")


class Stepped(trainer.Trainer):
    """The product's loop, one step at a time, always on the largest of the first batches."""

    def __init__(self, rank: int, world: int, meeting: str, told: loop.Job) -> None:
        super().__init__(rank, world, meeting, told)
        self.torch.set_num_threads(1)
        batches = self.task.epoch(0, world)
        self.turns = list(order.turns(len(batches), 0, rank, world))
        self.batch = max((batches[i] for i in range(40)), key=lambda batch: sum(each.size for each in batch.values()))

    def step(self) -> float:
        """Take a step; seconds that it took."""
        began = time.perf_counter()
        self._step(self.batch, self.turns[self.state.step % len(self.turns)], 0.5)
        return time.perf_counter() - began


def timed(rank: int, world: int, meeting: str, model: str, folder: Path, data: Path) -> dict[str, Step]:
    """Take steps in every setting, in turns."""
    from torch.utils.flop_counter import FlopCounterMode

    told = {name: {"warmup": 0, "reselect_every": STEPS, **SETTINGS[name]} for name in CASES[model].timed}
    runs = {name: Stepped(rank, world, meeting, job(model, folder / name, data, each)) for name, each in told.items()}
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
    sizes = {name: run.tool.state_bytes(run.engine).device.optimizer for name, run in runs.items()}
    return {name: Step(1e3 * mean(seconds[name]), operations[name] / PERIODS, sizes[name]) for name in runs}


def stepping(model: str, folder: Path, data: Path) -> dict[str, Any]:
    """Measure the steps in a process of their own."""
    return {name: asdict(each) for name, each in processes.run(1, timed, model, folder, data).items()}


def sent(rank: int, world: int, meeting: str, told: loop.Job, steps: int) -> float:
    """Take steps in two processes, each on a node of its own; bytes that one sends in a step, after the first two."""
    os.environ.update(GROUP_RANK=str(rank), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")  # each is a node
    run = Stepped(rank, world, meeting, told)
    for _ in range(3):
        run.step()
    before = watch.sent_bytes()
    for _ in range(steps):
        run.step()
    return (watch.sent_bytes() - before) / steps


def traffic(model: str, folder: Path, data: Path) -> dict[str, float]:
    """Bytes that a process of two sends in a step, by setting, and of ours with PowerSGD."""
    compressed = {"communication": {"method": "powersgd", "warmup_steps": 2}}
    told: dict[str, tuple[Turned, Turned]] = {name: (SETTINGS[name], {}) for name in SENT}
    told |= {"powersgd": ({}, compressed), f"{OURS}, powersgd": (SETTINGS[OURS], compressed)}
    found = {}
    for name, (each, turned) in told.items():
        sparse = {"warmup": 0, "reselect_every": 3, **each}
        one = job(model, folder / name, data, sparse, world_size=2, **turned)
        found[name] = processes.run(2, sent, one, 3 * 4)  # none to three blocks are frozen
        print(f"{model}: {name:32} sends {found[name] / 1e6:6.2f} MB a step", flush=True)
    return found


class Parting(trainer.Trainer):
    """The product's loop, which leaves a checkpoint where the warm-up ends."""

    warm = 0  # epochs of it

    def _end_epoch(self, batches: int) -> None:
        super()._end_epoch(batches)
        if self.state.epoch == self.warm:
            self.writer.write(self.state.step, self._files())


def trained(rank: int, world: int, meeting: str, told: loop.Job, resume: Path | None, warm: int = 0) -> list[float]:
    """Train as the product does, on one thread; the metric after each epoch."""
    run = Parting(rank, world, meeting, told, resume)
    run.warm = warm
    run.torch.set_num_threads(1)
    return [point.metric for point in run.run().curve]


def quality(model: str, folder: Path, data: Path) -> dict[str, dict[str, float]]:
    """Train from every seed, all at once: the metric by setting and seed."""
    case = CASES[model]
    found: dict[str, dict[str, float]] = {}
    warm = round(case.warmup * case.epochs)
    left = (case.epochs - warm) * processes.run(1, _batches, job(model, folder, data, {}))
    told = {"warmup": case.warmup, "reselect_every": max(1, round(left / case.periods))}

    def seed(number: int) -> None:
        root = folder / str(number)
        curve = processes.run(1, trained, job(model, root / DENSE, data, {}, seed=number), None, warm)
        note(DENSE, number, curve)
        note(STOPPED, number, curve[:warm])
        resume = checkpoints.newest(root / DENSE / "checkpoints")
        for name in case.judged:
            one = job(model, root / name, data, {**SETTINGS[name], **told}, seed=number)
            note(name, number, processes.run(1, trained, one, resume))
            shutil.rmtree(root / name)

    def note(name: str, number: int, curve: Sequence[float]) -> None:
        best = max(curve)
        found.setdefault(name, {})[str(number)] = math.exp(-best) if case.workload == "llm" else best
        print(f"{model}: seed {number}, {name}: {found[name][str(number)]:.5f}", flush=True)

    with ThreadPoolExecutor(len(SEEDS)) as pool:
        list(pool.map(seed, SEEDS))
    return found


def _batches(rank: int, world: int, meeting: str, told: loop.Job) -> int:
    return len(Stepped(rank, world, meeting, told).turns)


def claims(found: Mapping[str, Any]) -> list[Claim]:
    """Hold what was measured against what was published: by model steps, traffic and metric."""
    rows = []
    for model, measured in found.items():
        steps = {name: Step(**each) for name, each in measured.get("steps", {}).items()}
        rows += _saved(model, steps) if steps else []
        rows += _sent(model, measured["traffic"]) if "traffic" in measured else []
        rows += _cost(model, measured["metric"]) if "metric" in measured else []
    return rows


def _saved(model: str, steps: Mapping[str, Step]) -> list[Claim]:
    dense, rows = steps[DENSE], []
    for name in sorted(set(steps) - {DENSE}, key=lambda name: (name != OURS, steps[name].ms)):
        one = steps[name]
        ratio, size = dense.ms / one.ms, one.optimizer_bytes / dense.optimizer_bytes
        told = f"{one.ms:.0f} ms: {one.ms / dense.ms:.2f} x; {one.optimizer_bytes / 1e6:.1f} MB: {size:.0%}"
        base = f"{dense.ms:.0f} ms; {dense.optimizer_bytes / 1e6:.1f} MB"
        claim = f"{model}: step; optimizer state: {name}"
        rows.append(Claim(claim, "120 -> 85 ms: 0.71 x", base, told, ratio, one.ms / dense.ms <= PUBLISHED))
    if model == "ranker":  # torch does not count the grouped products of dense experts
        ours = steps[OURS].operations
        told = f"{ours / 1e9:.1f} billion: {ours / dense.operations - 1:+.0%}"
        base = f"{dense.operations / 1e9:.1f} billion"
        claim, ratio = f"{model}: operations of a step: {OURS}", dense.operations / ours
        rows.append(Claim(claim, "-30 %", base, told, ratio, ours <= 0.7 * dense.operations))
    return rows


def _sent(model: str, sent_bytes: Mapping[str, float]) -> list[Claim]:
    rows = []
    for name, size in sent_bytes.items():
        base = "powersgd" if name.endswith("powersgd") else DENSE
        whole = sent_bytes[base]
        if name != base:
            claim = f"{model}: sent by one of two processes a step: {name}"
            told, without = f"{size / 1e6:.2f} MB: {size / whole:.0%}", f"{whole / 1e6:.2f} MB ({base})"
            rows.append(Claim(claim, "none", without, told, whole / size, size < whole))
    return rows


def _cost(model: str, metric: Mapping[str, Mapping[str, float]]) -> list[Claim]:
    rows, dense, case = [], metric[DENSE], CASES[model]
    for name in sorted(set(metric) - {DENSE}, key=lambda name: (-len(metric[name]), name not in case.judged)):
        kept = [metric[name][seed] for seed in metric[name]]
        base = [dense[seed] for seed in metric[name]]
        less = case.workload == "llm"  # of perplexity, less is better
        ratio = mean(base) / mean(kept) if less else mean(kept) / mean(base)
        change = paired(base, kept) if len(kept) > 1 else f"{kept[0] / base[0] - 1:+.2%}"
        claim = f"{model}: {case.metric}, {len(kept)} seed(s), dense for {case.warmup:.0%}, then {name}"
        told = f"{mean(kept):.4f}; {change}"
        wanted = "none: what the last part adds" if name == STOPPED else "within 1 %"
        rows.append(Claim(claim, wanted, f"{mean(base):.4f}", told, ratio, ratio >= 0.99))
    return rows


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULT, help="what is not measured stays as it stands there")
    parser.add_argument("--model", choices=tuple(CASES), help="measure this alone")
    parser.add_argument("--part", choices=tuple(PARTS), help="measure this alone")
    options = parser.parse_args()
    known = json.loads(options.json.read_text()) if options.json.exists() else {}
    found = {model: known.get(model, {}) for model in CASES}
    with tempfile.TemporaryDirectory(prefix="slipway-sparse-") as temporary:
        for model in [options.model] if options.model else CASES:
            folder = Path(temporary) / model
            folder.mkdir()
            base.part(CASES[model].workload, "ingest").ingest(config.load(), folder / "data", {})
            for part in [options.part] if options.part else PARTS:
                found[model][part] = PARTS[part](model, folder / part, folder / "data")
    tell("Top-K sparse training", "python -m benchmarks.sparse", claims(found), options.json, found)


PARTS: dict[str, Callable[[str, Path, Path], Any]] = {"steps": stepping, "traffic": traffic, "metric": quality}

if __name__ == "__main__":
    main()
