"""The training loop: any workload's task on the DeepSpeed engine, in several processes, killable at any step.

A step is a function of the seed, the epoch, its place in the epoch and the rank: the order of the data comes from
them, and torch's generator is seeded anew for each step. So a run that goes on from a checkpoint ends with the same
weights, bit for bit, as one that was never stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slipway import artifacts, progress
from slipway.config import Section, TrainParams
from slipway.errors import CheckpointError, SlipwayError
from slipway.training import agreement, checkpoints, processes, watch
from slipway.workloads.base import Task, Tensors, part

if TYPE_CHECKING:
    import torch

WARMUP = 0.05  # share of the steps in which the learning rate rises
FLOOR = 0.02  # share of the peak that the cosine ends at

WEIGHTS, MODEL = "weights.npz", "model.json"


@dataclass(frozen=True)
class Job:
    """All that a process has to know to train."""

    workload: str
    data: Path
    """Folder of the ingested data."""
    train: TrainParams
    model: Section
    """The workload's own section."""
    checkpoints: Path
    """Folder of this run's checkpoints."""
    out: Path
    """Folder that rank 0 writes the trained model into."""


@dataclass(frozen=True)
class Point:
    """One point of the learning curve: the end of an epoch."""

    epoch: int
    step: int
    loss: float
    """Mean over the epoch and all processes."""
    metric: float
    """The workload's metric on validation data."""
    seconds: float
    """Time in training so far, pauses between runs left out."""
    samples_per_s: float


@dataclass(frozen=True)
class State:
    """Where a run stands; travels with its checkpoints."""

    epoch: int = 0
    step: int = 0
    """Steps done of this epoch."""
    loss: float = 0.0
    """Sum over the steps of this epoch, on rank 0; each rank keeps its own."""
    seconds: float = 0.0
    samples: int = 0
    curve: list[Point] = field(default_factory=list)

    @property
    def best(self) -> Point:
        """The epoch whose weights are kept: the earliest with the best metric."""
        return max(self.curve, key=lambda point: point.metric)


def train(job: Job) -> State:
    """Train in `job.train.world_size` processes, from the newest whole checkpoint if there is one.

    Waits while another call trains with the same checkpoints.

    Writes `weights.npz` (float32 arrays by parameter name, of the best epoch) and `model.json` into `job.out`.

    Raises:
        SlipwayError: the data are too few, the loss is no number any more.
        CheckpointError: a whole checkpoint does not fit the model.
        TransientError: a process was killed; the next call goes on.
    """
    job.checkpoints.parent.mkdir(parents=True, exist_ok=True)
    with job.checkpoints.with_suffix(".lock").open("a") as lock:
        # Held by every process: those of a killed run may outlive it for a moment and must not write meanwhile.
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest, held = checkpoints.newest(job.checkpoints), processes.Held(lock.fileno())
        state: State = processes.run(job.train.world_size, _rank, job, newest, held)
    return state


def forget(checkpoints: Path) -> None:
    """Remove the checkpoints of a run that has ended, unless another call of the same run goes on from them."""
    with checkpoints.with_suffix(".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        shutil.rmtree(checkpoints, ignore_errors=True)


def key(workload: str, data: Path, train: TrainParams, model: Section) -> str:
    """Name of a run: equal for equal data, parameters and code, so that a checkpoint never meets another model."""
    digest = hashlib.sha256(artifacts.sha256(data).encode())
    digest.update(repr((workload, train, model)).encode())
    here = Path(__file__).parent
    for source in [*sorted(here.glob("*.py")), *sorted((here.parent / "workloads" / workload).glob("*.py"))]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Rise linearly for a twentieth of the steps, then fall along a cosine to a fiftieth of the peak."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * share)))


def _rank(rank: int, world_size: int, meeting: str, job: Job, resume: Path | None, held: processes.Held) -> State:
    return _Loop(rank, world_size, meeting, job).run(resume)


class _Loop:
    """One process of a training run."""

    def __init__(self, rank: int, world_size: int, meeting: str, job: Job) -> None:
        import torch

        from slipway.training import engine

        self.rank, self.world_size, self.job, self.torch = rank, world_size, job, torch
        engine.join(rank, world_size, meeting)
        agreement.check(agreement.facts(job.workload, job.data, train=job.train, model=job.model), world_size)
        torch.manual_seed(job.train.seed)
        self.task: Task = part(job.workload, "training").TASK(job.data, job.train, job.model)
        self.engine = engine.make(self.task.model(), job.train)
        self.steps = len(self.task.epoch(0, rank))
        self.state = State()
        self.best: dict[str, np.ndarray[Any, Any]] = {}
        self.saved = self.began = time.monotonic()

    def run(self, resume: Path | None) -> State:
        if resume is not None:
            self._load(resume)
        train, total = self.job.train, self.job.train.epochs * self.steps
        done = self.state.epoch * self.steps + self.state.step
        self.saved = self.began = time.monotonic()
        with progress.Progress("train", total, "steps", done) if self.rank == 0 else _Silent() as shown:
            for epoch in range(self.state.epoch, train.epochs):
                batches = self.task.epoch(epoch, self.rank)
                for step in range(self.state.step, self.steps):
                    with watch.part("data"):
                        batch = batches[step]
                    self._step(batch, epoch * self.steps + step, total)
                    shown.advance(1, **self._figures(epoch))
                    self._save_when_due()
                self._end_epoch()
        if self.rank == 0:
            self._write()
        return self._now()

    def _step(self, batch: Tensors, step: int, total: int) -> None:
        torch = self.torch
        torch.manual_seed(_mixed(self.job.train.seed, step, self.rank))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.job.train.learning_rate, step, total)
        with watch.part("data"):
            tensors = {name: torch.from_numpy(value).to(self.engine.device) for name, value in batch.items()}
        with watch.part("forward"):
            loss = self.engine(**tensors)
        with watch.part("backward"):
            self.engine.backward(loss)
        with watch.part("optimizer"):
            self.engine.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise SlipwayError(
                f"training: the loss is {value} at step {step}; lower train.learning_rate (now "
                f"{self.job.train.learning_rate:g})" + (" or use fp32" if self.job.train.precision != "fp32" else "")
            )
        units = self.task.count(batch) * self.world_size
        state = self.state
        self.state = replace(state, step=state.step + 1, loss=state.loss + value, samples=state.samples + units)

    def _figures(self, epoch: int) -> dict[str, float | str]:
        now = self._now()
        figures: dict[str, float | str] = {
            "epoch": f"{epoch + 1}/{self.job.train.epochs}",
            "loss": now.loss / max(1, now.step),
            f"{self.task.unit}/s": f"{now.samples / max(now.seconds, 1e-9):,.0f}",
        }
        return figures | ({self.task.metric: self.state.curve[-1].metric} if self.state.curve else {})

    def _now(self) -> State:
        return replace(self.state, seconds=self.state.seconds + time.monotonic() - self.began)

    def _end_epoch(self) -> None:
        module = self.engine.module
        module.eval()
        with watch.part("validation"), self.torch.no_grad():
            metric, count = self.task.validate(module, self.rank)
        module.train()
        sums = self.torch.tensor([metric, count, self.state.loss], dtype=self.torch.float64, device=self.engine.device)
        self.torch.distributed.all_reduce(sums)
        total, seen, loss = sums.tolist()
        now = self._now()
        point = Point(
            epoch=now.epoch + 1,
            step=(now.epoch + 1) * self.steps,
            loss=loss / self.world_size / self.steps,
            metric=total / max(1.0, seen),
            seconds=round(now.seconds, 3),
            samples_per_s=round(now.samples / now.seconds, 1),
        )
        if self.rank == 0 and (not self.state.curve or point.metric > self.state.best.metric):
            self.best = _weights(module)
        curve = [*self.state.curve, point]
        self.state = replace(self.state, epoch=now.epoch + 1, step=0, loss=0.0, curve=curve)

    def _save_when_due(self) -> None:
        due = self.torch.tensor(
            [time.monotonic() - self.saved >= self.job.train.checkpoint_every_s], dtype=self.torch.int32
        )
        due = due.to(self.engine.device)
        self.torch.distributed.broadcast(due, 0)  # one clock decides for all
        if due.item():
            done = self.state.epoch * self.steps + self.state.step
            with watch.part("checkpoint"):
                checkpoints.write(
                    self.job.checkpoints, done, self.rank == 0, self._fill, self.torch.distributed.barrier
                )
            self.saved = time.monotonic()

    def _fill(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag="engine", save_latest=False)
        artifacts.write_json(folder / f"state-{self.rank}.json", asdict(self._now()))
        if self.rank == 0:
            np.savez(folder / "best.npz", **self.best)  # type: ignore[arg-type]  # the stub takes them for allow_pickle

    def _load(self, folder: Path) -> None:
        try:
            self.engine.load_checkpoint(str(folder), tag="engine")
        except (RuntimeError, KeyError, ValueError, OSError) as error:
            raise CheckpointError(f"{folder}: does not fit this model ({error}); remove it to start again") from error
        raw = artifacts.read_json(folder / f"state-{self.rank}.json")
        self.state = State(**{**raw, "curve": [Point(**point) for point in raw["curve"]]})
        if self.rank == 0:
            with np.load(folder / "best.npz", allow_pickle=False) as stored:
                self.best = dict(stored)

    def _write(self) -> None:
        out = self.job.out
        out.mkdir(parents=True, exist_ok=True)
        np.savez(out / WEIGHTS, **self.best)  # type: ignore[arg-type]  # the stub takes them for allow_pickle
        artifacts.write_json(out / MODEL, {"workload": self.job.workload, **self.task.about()})


class _Silent:
    """Stands in for the progress of the other ranks."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def advance(self, amount: float = 1.0, **figures: float | str) -> None: ...


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _weights(module: torch.nn.Module) -> dict[str, np.ndarray[Any, Any]]:
    return {name: value.detach().float().cpu().numpy().copy() for name, value in module.state_dict().items()}
