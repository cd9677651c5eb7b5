"""The training loop: any workload's task on the DeepSpeed engine, in several processes, killable at any step.

A step is a function of the seed, the epoch and the place of its micro-batches in the epoch: the order of the data comes
from them, and torch's generator is seeded anew for each. So a run that goes on from a checkpoint ends with the same
weights, bit for bit, as one that was never stopped.

A technique that has a state of its own puts it into `_Loop.kept` under a name of its own, as an object with torch's
`state_dict` and `load_state_dict`: each process keeps its own in a checkpoint (tensors and plain values, what
`torch.load(weights_only=True)` takes) and has it back when the run goes on with as many processes; with another
number of them it starts anew, with a warning.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slipway import artifacts, progress
from slipway.config import Section, TrainParams
from slipway.errors import DivergedError, TransientError
from slipway.training import agreement, checkpoints, live, order, processes, watch
from slipway.training.guard import Guard
from slipway.training.loader import Loader
from slipway.workloads.base import Array, Task, Tensors, part

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

WARMUP = 0.05  # share of the training in which the learning rate rises
FLOOR = 0.02  # share of the peak that the cosine ends at

WEIGHTS, MODEL = "weights.npz", "model.json"
FIGURES = ("loss", "metric", "seconds", "samples_per_s")  # of a point of the learning curve, as curve/KEY in MLflow
UNIVERSAL = ".universal"  # a checkpoint converted for another number of processes, until it is loaded
FREE = {"world_size", "loader", "profile", "restarts", "checkpoint_every_s", "patience", "device_memory_gb"}
"""Parameters that may change between a run that was killed and the one that goes on from its checkpoints."""

log = logging.getLogger(__name__)


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
    run: str = ""
    """The pipeline run whose MLflow run gets the figures while training lasts; empty: none does."""
    trace: Path | None = None
    """File, ending in .json.gz, that rank 0 writes a trace of a few steps into."""


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
    at_ms: int = 0
    """Wall clock."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What the metric also tells, such as perplexity."""


@dataclass(frozen=True)
class LossScale:
    """A change of fp16's loss scale, or its first value."""

    step: int
    scale: float
    """Scale from the next step on."""
    overflow: bool
    """A gradient overflowed in this step, which was skipped."""


@dataclass(frozen=True)
class State:
    """Where a run stands; travels with its checkpoints."""

    epoch: int = 0
    step: int = 0
    """Steps done, of all epochs."""
    seen: int = 0
    """Micro-batches done of this epoch, by all processes."""
    ranks: int = 1
    """Number of processes that this epoch began with: its order depends on it."""
    loss: float = 0.0
    """Sum over this epoch's micro-batches of this process."""
    seconds: float = 0.0
    samples: int = 0
    curve: list[Point] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    """What the meter tells of the run, once it has ended."""
    lost: int = 0
    """Steps of this epoch that fp16 skipped because the loss was no number; they are not in `loss`."""
    loss_scale: list[LossScale] = field(default_factory=list)
    """fp16 alone."""

    @property
    def best(self) -> Point:
        """The epoch whose weights are kept: the earliest with the best metric."""
        return max(self.curve, key=lambda point: point.metric)


def train(job: Job) -> State:
    """Train in `job.train.world_size` processes, from the newest whole checkpoint if there is one.

    Waits while another call trains with the same checkpoints. When a process is killed, all are started again from the
    newest checkpoint, at most `job.train.restarts` times.

    Writes `weights.npz` (float32 arrays by parameter name, of the best epoch) and `model.json` into `job.out`.

    Raises:
        SlipwayError: the data are too few, or processes disagree on what they train.
        DivergedError: the loss is no number any more, or explodes; the last good checkpoint is kept.
        CheckpointError: a whole checkpoint does not fit the model.
        TransientError: a process was killed once more than that; the next call goes on.
    """
    job.checkpoints.parent.mkdir(parents=True, exist_ok=True)
    with job.checkpoints.with_suffix(".lock").open("a") as lock:
        # Held by every process: those of a killed run may outlive it for a moment and must not write meanwhile.
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return _persist(job, processes.Held(lock.fileno()))
        except DivergedError as error:
            good = checkpoints.drop(job.checkpoints, error.step)
            kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint from before it"
            raise DivergedError(f"{error}; {kept}", error.step) from error


def _persist(job: Job, held: processes.Held) -> State:
    """Train, and start again when a process was killed."""
    for left in range(job.train.restarts, 0, -1):
        try:
            return _run(job, held)
        except TransientError as error:
            log.warning("%s; starting again from the last checkpoint, %d restarts left", error, left - 1)
    try:
        return _run(job, held)
    except TransientError as error:
        raise TransientError(
            f"{error}; started again {job.train.restarts} times (train.restarts); run the stage again: it goes on from "
            "its last checkpoint"
        ) from error


def _run(job: Job, held: processes.Held) -> State:
    newest = checkpoints.newest(job.checkpoints)
    if newest is not None and _processes(newest) != job.train.world_size:
        log.warning("%s: of %d processes, going on with %d", newest, _processes(newest), job.train.world_size)
        newest = processes.run(1, _convert, newest, job.checkpoints / UNIVERSAL)
    state: State = processes.run(job.train.world_size, _rank, job, newest, held)
    return state


def _convert(_rank: int, _world_size: int, _meeting: str, folder: Path, out: Path) -> Path:
    """Make a checkpoint fit any number of processes; runs in a process of its own, since it needs DeepSpeed."""
    from slipway.training import snapshots

    if not snapshots.partitioned(folder):
        return folder
    snapshots.convert(folder, out)
    for file in folder.iterdir():
        if file.is_file():
            shutil.copy2(file, out)
    return out


def _processes(checkpoint: Path) -> int:
    """How many processes wrote a checkpoint."""
    return len(list(checkpoint.glob("state-*.json")))


def forget(checkpoints: Path) -> None:
    """Remove the checkpoints of a run that has ended, unless another call of the same run goes on from them."""
    with checkpoints.with_suffix(".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        shutil.rmtree(checkpoints, ignore_errors=True)


def key(workload: str, data: Path, train: TrainParams, model: Section) -> str:
    """Name of a run: equal for equal data, parameters and code, so that a checkpoint never meets another model.

    Parameters that may change on the way (`FREE`) are left out.
    """
    digest = hashlib.sha256(artifacts.sha256(data).encode())
    digest.update(repr((workload, train.model_dump(exclude=FREE), model)).encode())
    here = Path(__file__).parent
    for source in [*sorted(here.glob("*.py")), *sorted((here.parent / "workloads" / workload).glob("*.py"))]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


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


def _rank(rank: int, world_size: int, meeting: str, job: Job, resume: Path | None, held: processes.Held) -> State:
    return _Loop(rank, world_size, meeting, job, resume).run()


class _Loop:
    """One process of a training run."""

    def __init__(self, rank: int, world_size: int, meeting: str, job: Job, resume: Path | None = None) -> None:
        import torch

        from slipway.training import communication, engine, meter, snapshots, sparse

        self.rank, self.world_size, self.job, self.torch, self.tool = rank, world_size, job, torch, engine
        engine.join(rank, world_size, meeting)
        agreement.check(agreement.facts(job.workload, job.data, train=job.train, model=job.model), world_size)
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
        self.kept: dict[str, Stateful] = {"communication": self.reducer, "meter": self.meter, "guard": self.guard}
        self.state = State(ranks=world_size)
        self.best: dict[str, Array] = {}
        self.saved = self.began = time.monotonic()
        self.snapshots, self.writer = snapshots, checkpoints.Writer(job.checkpoints, rank == 0, engine.exchange())
        if resume is not None:
            self._load(resume)

    def run(self) -> State:
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
        if self.sparse.begin(state.step):
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
        if self.meter.samples:
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
            files["best.npz"] = partial(_save, self.best)
        return files

    def _load(self, folder: Path) -> None:
        states = [artifacts.read_json(path) for path in sorted(folder.glob("state-*.json"), key=_number)]
        same = len(states) == self.world_size
        raw = states[self.rank if same else 0]
        curve, scales = [Point(**point) for point in raw["curve"]], [LossScale(**scale) for scale in raw["loss_scale"]]
        self.state = State(**{**raw, "curve": curve, "loss_scale": scales})
        if not same:  # what each of them had summed up goes to one
            loss, lost = (sum(state[name] for state in states) if self.rank == 0 else 0 for name in ("loss", "lost"))
            self.state = replace(self.state, loss=loss, lost=lost)
        self.sparse.restore(self.state.step)
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
        out = self.job.out
        out.mkdir(parents=True, exist_ok=True)
        _save(self.best, out / WEIGHTS)
        artifacts.write_json(out / MODEL, {"workload": self.job.workload, **self.task.about()})


def _task(job: Job) -> Task:
    task: Task = part(job.workload, "training").TASK(job.data, job.train, job.model)
    return task


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


def _save(arrays: Mapping[str, Array], path: Path) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]  # the stub takes them for allow_pickle
