"""The training loop of one process: any workload's task on the DeepSpeed engine, killable at any step.

A step is a function of the seed, the epoch and the place of its micro-batches in the epoch: the order of the data comes
from them, and torch's generator is seeded anew for each. So a run that goes on from a checkpoint ends with the same
weights, bit for bit, as one that was never stopped.

A technique that has a state of its own puts it into `Trainer.kept` under a name of its own, as an object with torch's
`state_dict` and `load_state_dict`: each process keeps its own in a checkpoint (tensors and plain values, what
`torch.load(weights_only=True)` takes) and has it back when the run goes on with as many processes; with another
number of them it starts anew, with a warning.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slipway import artifacts, progress, trained
from slipway.training import agreement, checkpoints, live, order, processes, watch
from slipway.training.guard import Guard
from slipway.training.loader import Loader
from slipway.training.state import Job, LossScale, Point, State
from slipway.workloads.base import Array, Task, Tensors, part

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

WARMUP = 0.05  # share of the training in which the learning rate rises
FLOOR = 0.02  # share of the peak that the cosine ends at

FIGURES = ("loss", "metric", "seconds", "samples_per_s")  # of a point of the learning curve, as curve/KEY in MLflow
UNIVERSAL = ".universal"  # a checkpoint converted for another number of processes, until it is loaded

log = logging.getLogger(__name__)


def learning_rate(peak: float, progress: float) -> float:
    """Rise linearly for a twentieth of the training, then fall along a cosine to a fiftieth of the peak.

    Args:
        peak: the highest rate.
        progress: share of the training that is done at the end of the step (over 0 to 1): in samples, not in steps, so
            that the schedule goes on where it was when the number of processes changes.
    """
    if progress < WARMUP:
        return peak * progress / WARMUP
    share = (progress - WARMUP) / (1 - WARMUP)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * share)))


def run(rank: int, world_size: int, meeting: str, job: Job, resume: Path | None, held: processes.Held) -> State:
    """Be one process of a training run."""
    return Trainer(rank, world_size, meeting, job, resume).run()


class Trainer:
    """One process of a training run."""

    def __init__(self, rank: int, world_size: int, meeting: str, job: Job, resume: Path | None = None) -> None:
        import torch

        from slipway.training import communication, engine, meter, snapshots, sparse, statistics

        self.rank, self.world_size, self.job, self.torch, self.tool = rank, world_size, job, torch, engine
        engine.join(rank, world_size, meeting)
        mine = agreement.facts(job.workload, job.data, job.checkpoints.name, train=job.train, model=job.model)
        agreement.check(mine, world_size)
        torch.manual_seed(job.train.seed)
        self.task = _task(job)
        self.disk = job.checkpoints.parent / "offload"
        converted = resume is not None and resume.name == UNIVERSAL
        self.engine = engine.make(self.task.model(), job.train, self.disk, converted)
        self.sparse = sparse.Sparse(self.engine.module, self.engine.optimizer, job.train.sparse)
        self.reducer = communication.attach(self.engine, job.train)
        self.live = live.Live(job.run if rank == 0 else "")
        self.meter = meter.Meter(self.task.unit, job.train.precision, self.engine.device, self.live.tell)
        self.guard = Guard(job.train)
        self.statistics = statistics.Statistics(self.engine.module)
        self.kept: dict[str, Stateful] = {
            "communication": self.reducer,
            "meter": self.meter,
            "guard": self.guard,
            "statistics": self.statistics,
        }
        self.state = State(ranks=world_size)
        self.best: dict[str, Array] = {}
        self.saved = self.began = time.monotonic()
        self.snapshots, self.writer = snapshots, checkpoints.Writer(job.checkpoints, rank == 0, engine.exchange())
        if resume is not None:
            self._load(resume)

    def run(self) -> State:
        """Train to the end; where the run then stands."""
        self.saved = self.began = time.monotonic()
        bar = progress.Progress("train", self._steps(), "steps", self.state.step) if self.rank == 0 else _Silent()
        loader = Loader(partial(_task, self.job), self.job.train.loader)
        with bar as shown, self._traced() as traced, loader:
            for epoch in range(self.state.epoch, self.job.train.epochs):
                if self._stale():
                    break
                batches = self.task.epoch(epoch, self.state.ranks)
                turns = order.turns(len(batches), self.state.seen, self.rank, self.world_size)
                made = loader.epoch(epoch, self.state.ranks, batches, [turn.index for turn in turns])
                for turn in turns:
                    with watch.part("data"):
                        batch = next(made)
                    self._step(batch, turn, (epoch + turn.seen / len(batches)) / self.job.train.epochs)
                    traced()
                    shown.advance(1, **self._figures(epoch))
                    self._save_when_due()
                with watch.part("validation"):
                    self._end_epoch(len(batches))
            self.meter.sample()
        self.writer.wait()
        if self.rank == 0:
            self._write()
        self.live.close()
        return replace(self._now(), figures={"metric": self.task.metric, **self.meter.report()})

    def _steps(self) -> int:
        """Steps of the whole training, for the bar: those done, the rest of this epoch, and the epochs after it."""
        count, state = len(self.task.epoch(self.state.epoch, self.state.ranks)), self.state
        rest = -(-(count - state.seen) // self.world_size)
        return state.step + rest + (self.job.train.epochs - state.epoch - 1) * -(-count // self.world_size)

    def _stale(self) -> bool:
        """Whether the validation metric has not risen for as long as `train.patience` allows; equal on every rank."""
        patience, curve = self.job.train.patience, self.state.curve
        stale = 0 < patience <= (curve[-1].epoch - self.state.best.epoch if curve else 0)
        if stale:
            log.info("no better %s for %d epochs: training ends", self.task.metric, patience)
        return stale

    def _step(self, batch: Tensors, turn: order.Turn, done: float) -> None:
        torch, state, rate = self.torch, self.state, learning_rate(self.job.train.learning_rate, done)
        torch.manual_seed(_mixed(self.job.train.seed, state.epoch, turn.index))
        if self.sparse.begin(state.step, done):
            self.reducer.forget()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        with watch.part("data"):
            tensors = {name: torch.from_numpy(value).to(self.engine.device) for name, value in batch.items()}
        with self.meter.counting(batch):
            with watch.part("forward"):
                loss = self.engine(**tensors)
            with watch.part("backward"):
                self.engine.backward(loss * turn.weight)
        with watch.part("communication"):
            self.reducer.reduce(self.engine.module.parameters())
        with watch.part("optimizer"):
            self.engine.step()
        value, norm, skipped = float(loss.detach()), self.tool.gradient_norm(self.engine), self._scaled()
        self.guard.check(state.step, value, norm, skipped)
        units = self.task.count(batch) * (turn.seen - state.seen)
        self.meter.step(value, units, None if skipped else norm, rate, self.tool.loss_scale(self.engine), skipped)
        lost = bool(turn.weight) and not math.isfinite(value)
        total = state.loss + (value if turn.weight and not lost else 0.0)
        self.state = replace(
            self.state,
            step=state.step + 1,
            seen=turn.seen,
            loss=total,
            lost=state.lost + lost,
            samples=state.samples + units,
        )

    def _scaled(self) -> bool:
        """Note a change of the loss scale; whether this step was skipped for an overflow."""
        scale, skipped = self.tool.loss_scale(self.engine), self.tool.overflowed(self.engine)
        known, step = self.state.loss_scale, self.state.step
        if scale is not None and (skipped or not known or scale != known[-1].scale):
            self.state = replace(self.state, loss_scale=[*known, LossScale(step, scale, skipped)])
        return skipped

    def _figures(self, epoch: int) -> dict[str, float | str]:
        now = self._now()
        figures: dict[str, float | str] = {
            "epoch": f"{epoch + 1}/{self.job.train.epochs}",
            "loss": now.loss * self.world_size / max(1, now.seen),
            f"{self.task.unit}/s": f"{now.samples / max(now.seconds, 1e-9):,.0f}",
        }
        if self.meter.samples and "mfu" in self.meter.samples[-1].figures:
            figures["mfu"] = f"{self.meter.samples[-1].figures['mfu']:.0%}"
        if not self.state.curve:
            return figures
        last = self.state.curve[-1]
        return {**figures, self.task.metric: last.metric, **last.figures}

    def _traced(self) -> AbstractContextManager[Callable[[], None]]:
        from slipway.training import profile

        return profile.recording(self.job.trace if self.rank == 0 else None)

    def _now(self) -> State:
        return replace(self.state, seconds=self.state.seconds + time.monotonic() - self.began)

    def _end_epoch(self, batches: int) -> None:
        self.statistics.average()
        with self.tool.evaluating(self.engine) as module:
            metric, count = self.task.validate(module, self.rank)
        lost = self.state.lost
        sums = self.torch.tensor(
            [metric, count, self.state.loss, lost], dtype=self.torch.float64, device=self.engine.device
        )
        self.torch.distributed.all_reduce(sums)
        total, seen, loss, lost = sums.tolist()
        now = self._now()
        point = Point(
            epoch=now.epoch + 1,
            step=now.step,
            loss=loss / max(1.0, batches - lost),
            metric=total / max(1.0, seen),
            figures=dict(self.task.figures(total / max(1.0, seen))),
            seconds=round(now.seconds, 3),
            samples_per_s=round(now.samples / now.seconds, 1),
            at_ms=int(time.time() * 1000),
        )
        shown = {key: getattr(point, key) for key in FIGURES}
        self.live.put("curve", point.step, point.at_ms, {**shown, **point.figures})
        if not self.state.curve or point.metric > self.state.best.metric:
            self.best = self.tool.weights(self.engine)  # of all ranks together
        curve = [*self.state.curve, point]
        self.state = replace(
            self.state, epoch=now.epoch + 1, seen=0, ranks=self.world_size, loss=0.0, lost=0, curve=curve
        )

    def _save_when_due(self) -> None:
        # Rank 0's clock decides for all; but none is written while the loss of any process is suspicious.
        late = time.monotonic() - self.saved >= self.job.train.checkpoint_every_s
        due = self.rank != 0 or (late and not self.writer.busy)
        agreed = self.torch.tensor([due and self.guard.calm], dtype=self.torch.int32, device=self.engine.device)
        with watch.part("communication"):
            self.torch.distributed.all_reduce(agreed, self.torch.distributed.ReduceOp.MIN)
        if agreed.item():
            with watch.part("checkpoint"):
                self.writer.write(self.state.step, self._files())
            self.saved = time.monotonic()

    def _files(self) -> checkpoints.Files:
        files = dict(self.snapshots.take(self.engine, checkpoints.beside(self.job.checkpoints, self.state.step)))
        files[f"state-{self.rank}.json"] = partial(artifacts.write_json, value=asdict(self._now()))
        for name, kept in self.kept.items():
            files[f"{name}-{self.rank}.pt"] = partial(self.torch.save, self.snapshots.copied(kept.state_dict()))
        if self.rank == 0:
            files["best.npz"] = partial(trained.save, self.best)
        return files

    def _load(self, folder: Path) -> None:
        states = [artifacts.read_json(path) for path in sorted(folder.glob("state-*.json"), key=_number)]
        self.state, same = State.read(states, self.rank, self.world_size), len(states) == self.world_size
        count = len(self.task.epoch(self.state.epoch, self.state.ranks))
        self.sparse.restore((self.state.epoch + self.state.seen / count) / self.job.train.epochs)
        self.snapshots.restore(self.engine, folder)
        self.tool.settle(self.engine, self.job.train, self.disk)
        for name, kept in self.kept.items():
            if same:
                kept.load_state_dict(self.torch.load(folder / f"{name}-{self.rank}.pt", weights_only=True))
            else:
                log.warning("%s starts anew: its state was that of %d processes", name, len(states))
        if self.rank == 0:
            with np.load(folder / "best.npz", allow_pickle=False) as stored:
                self.best = dict(stored)
        self.torch.distributed.barrier()
        if folder.name == UNIVERSAL and self.rank == 0:
            shutil.rmtree(folder)

    def _write(self) -> None:
        trained.write(self.job.out, self.job.workload, self.best, self.task.about())


def _task(job: Job) -> Task:
    task: Task = part(job.workload, "training").TASK(job.data, job.train, job.model)
    return task if job.wrap is None else job.wrap(task)


class _Silent:
    """Stands in for the progress of the other ranks."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def advance(self, amount: float = 1.0, **figures: float | str) -> None: ...


def _number(state: Path) -> int:
    return int(state.stem.removeprefix("state-"))


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
