"""Checkpoints and restarts: how long training waits for one, what a killed process costs, and another number of them.

    python -m benchmarks.checkpoints [--json FILE] [--saves 2]

The wait is measured on a ranker of tens of millions of parameters: a checkpoint that training waits for until it is
sealed on the disk, and one that is written behind it, in turn. The kills are real: SIGKILL of a process in the midst of
training on synthetic sequences; the end is compared with that of a run that was left alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.claims import Claim, tell
from benchmarks.communication import synthetic
from slipway import trained
from slipway.errors import TransientError
from slipway.params import TrainParams
from slipway.training import checkpoints, loop, order, processes, trainer
from slipway.workloads.ranker.params import RankerParams

COMMAND = "python -m benchmarks.checkpoints"
LARGE = RankerParams(width=512, blocks=2, max_length=12, negatives=64)
SMALL = RankerParams(width=64, blocks=1, max_length=10, dropout=0.2, negatives=128)


@dataclass(frozen=True)
class Waits:
    """Seconds of rank 0 in two processes."""

    parameters: int
    bytes_written: int
    sync_s: list[float]
    """That training stood still for a checkpoint that it waited for."""
    behind_s: list[float]
    """That it stood still for one written behind it."""
    step_s: float
    step_beside_s: float
    """Of a step while a checkpoint was written."""


def waits(folder: Path, saves: int) -> Waits:
    """Write checkpoints of a large model in both ways, in turn."""
    data = synthetic(folder / "large", 8000, 60_000, 12)
    train = TrainParams(batch_size=32, world_size=2, checkpoint_every_s=1e6, epochs=1)
    job = loop.Job("ranker", data, train, LARGE, folder / "checkpoints", folder / "out")
    found: Waits = processes.run(2, _waits, job, saves)
    return found


def _waits(rank: int, world_size: int, meeting: str, job: loop.Job, saves: int) -> Waits:
    one = trainer.Trainer(rank, world_size, meeting, job)
    batches = one.task.epoch(0, world_size)
    turns = iter(order.turns(len(batches), 0, rank, world_size))

    def step() -> float:
        began, turn = time.perf_counter(), next(turns)
        one._step(batches[turn.index], turn, turn.seen / len(batches))
        return time.perf_counter() - began

    def stood(wait: bool) -> float:
        one.torch.distributed.barrier()
        began = time.perf_counter()
        one.writer.write(one.state.step, one._files())
        if wait:
            one.writer.wait()
        one.torch.distributed.barrier()
        return time.perf_counter() - began

    for _ in range(3):
        step()
    sync, behind, alone, beside = [], [], [], []
    for _ in range(saves):
        alone += [step() for _ in range(3)]
        sync.append(stood(wait=True))
        alone += [step() for _ in range(3)]
        behind.append(stood(wait=False))
        beside += [step() for _ in range(3)]
        one.writer.wait()
    newest = checkpoints.newest(job.checkpoints) if rank == 0 else None
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) if newest else 0
    count = sum(p.numel() for p in one.engine.module.parameters())
    return Waits(count, size, sync, behind, median(alone), median(beside))


@dataclass(frozen=True)
class End:
    """How a run ended."""

    losses: list[float]
    metric: float
    weights: dict[str, bytes]
    seconds: float
    """Wall clock, with all starts."""


def run(job: loop.Job, killed: bool = False, then: int | None = None) -> End:
    """Train; if `killed`, with a SIGKILL of a process after the second checkpoint; `then` that many processes."""
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(loop.train, job)
        if killed:
            while len(list(job.checkpoints.glob("step-*"))) < 2 and not training.done():
                time.sleep(0.002)
            os.kill(_pid(job.train.world_size - 1), signal.SIGKILL)
        with suppress(TransientError):
            training.result()
        if then is not None:
            job = replace(job, train=job.train.model_copy(update={"world_size": then, "checkpoint_every_s": 1e6}))
            training = pool.submit(loop.train, job)
        state = training.result()
    seconds = time.monotonic() - began
    with np.load(job.out / trained.WEIGHTS) as stored:
        weights = {name: stored[name].tobytes() for name in stored.files}
    return End([point.loss for point in state.curve], state.best.metric, weights, seconds)


def _pid(rank: int) -> int:
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    found = [pid for pid, parent, name in _processes() if parent == server and name == f"slipway rank {rank}"]
    return found[0]


def _processes() -> Iterator[tuple[int, int, str]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            pid, _, rest = path.read_text().partition(" (")
            name, _, tail = rest.rpartition(") ")
            yield int(pid), int(tail.split()[1]), name


def ends(folder: Path) -> dict[str, End]:
    """Train left alone on two and on one, killed and started again, and killed and gone on with another number."""
    data = synthetic(folder / "small", 4000, 200, 12)  # seconds of training on a quick machine, to be killed in

    def job(name: str, world_size: int, restarts: int, every_s: float) -> loop.Job:
        told = {"world_size": world_size, "restarts": restarts, "checkpoint_every_s": every_s}
        train = TrainParams.model_validate({"epochs": 4, "batch_size": 32, **told})
        return loop.Job("ranker", data, train, SMALL, folder / name / "checkpoints", folder / name / "out")

    runs: dict[str, Callable[[], End]] = {
        "2": lambda: run(job("2", 2, 0, 0.2)),
        "2, killed": lambda: run(job("killed", 2, 1, 0.2), killed=True),
        "2, then 1": lambda: run(job("2-1", 2, 0, 0.2), killed=True, then=1),
        "1": lambda: run(job("1", 1, 0, 0.2)),
        "1, then 2": lambda: run(job("1-2", 1, 0, 0.2), killed=True, then=2),
    }
    return {name: start() for name, start in runs.items()}


def claims(found: Waits, ended: dict[str, End]) -> list[Claim]:
    """Rows for the table."""
    sync, behind = median(found.sync_s), median(found.behind_s)
    alone, killed = ended["2"], ended["2, killed"]
    same = alone.losses == killed.losses and alone.weights == killed.weights
    rows = [
        Claim(
            f"training waits for a checkpoint ({found.parameters / 1e6:.0f} M parameters, "
            f"{found.bytes_written / 1e6:.0f} MB)",
            "asynchronous",
            f"{sync:.2f} s (a step: {found.step_s:.2f} s)",
            f"{behind:.2f} s (a step beside it: {found.step_beside_s:.2f} s)",
            sync / behind,
            behind < sync,
        ),
        Claim(
            "kill -9 of one of 2 processes: the end",
            "identical",
            f"loss {alone.losses[-1]:.6f}, {alone.seconds:.0f} s",
            f"loss {killed.losses[-1]:.6f}, weights {'the same bits' if same else 'differ'}, {killed.seconds:.0f} s",
            alone.seconds / killed.seconds,
            same,
        ),
    ]
    for name, peer in (("2, then 1", "2"), ("1, then 2", "1")):
        one, other = ended[name], ended[peer]
        rows.append(
            Claim(
                f"{name} processes: loss by epoch against {peer} throughout",
                "resumes",
                " ".join(f"{loss:.2f}" for loss in other.losses) + f", metric {other.metric:.3f}",
                " ".join(f"{loss:.2f}" for loss in one.losses) + f", metric {one.metric:.3f}",
                one.metric / other.metric,
                len(one.losses) == len(other.losses) and one.losses == sorted(one.losses, reverse=True),
            )
        )
    return rows


def main() -> None:
    """Measure, compare, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--saves", type=int, default=2, help="checkpoints of each kind")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        found, ended = waits(Path(made), options.saves), ends(Path(made))
    tell("Checkpoints", COMMAND, claims(found, ended), options.json)


if __name__ == "__main__":
    main()
