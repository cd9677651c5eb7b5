"""What a training run is told, and where it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slipway.params import Section, TrainParams
from slipway.workloads.base import Task


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
    wrap: Callable[[Task], Task] | None = None
    """Makes another task of the workload's, in every process; pickled."""


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

    @classmethod
    def read(cls, written: Sequence[Mapping[str, Any]], rank: int, ranks: int) -> State:
        """Take up what the processes of a checkpoint wrote, as process `rank` of `ranks`.

        With another number of processes than wrote it, what each of them had summed up goes to the first.
        """
        same = len(written) == ranks
        raw = written[rank if same else 0]
        curve, scales = [Point(**point) for point in raw["curve"]], [LossScale(**scale) for scale in raw["loss_scale"]]
        state = cls(**{**raw, "curve": curve, "loss_scale": scales})
        if same:
            return state
        loss, lost = (sum(each[name] for each in written) if rank == 0 else 0 for name in ("loss", "lost"))
        return replace(state, loss=loss, lost=lost)
