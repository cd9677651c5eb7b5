"""Training that goes on from a compressed network: the workload's own task with another network in its model.

A model that can be trained on holds the part that is compressed as its attribute `network`. The project's training loop
does the rest, so it is killable, and resumed, like any training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipway import artifacts, trained
from slipway.params import Params, TrainParams
from slipway.training import loop
from slipway.workloads.base import Array, Task, Tensors

if TYPE_CHECKING:
    import torch

PLACES = "rounding"  # in model.json: where a network that rounds keeps its ranges
PREFIX = "network."
TURNED = {"finetune_epochs", "finetune_rate"}


@dataclass(frozen=True)
class Start:
    """What the training of a compressed network starts from."""

    network: Path
    """The network, saved by torch; a file of our own making."""
    teacher: Path | None = None
    """The full network, which teaches; None: the labels alone do."""
    rounds: Mapping[str, str] | None = None
    """For quantization-aware training: as `qat.prepare` takes its modules."""
    example: tuple[int, ...] = ()
    """Shape of the network's input."""

    def __call__(self, task: Task) -> Task:
        """The task with this network."""
        return Finetuned(task, self)


class Finetuned:
    """A workload's task whose model holds another network."""

    def __init__(self, task: Task, start: Start) -> None:
        self.task, self.start = task, start
        self.metric, self.unit = task.metric, task.unit
        self.places: dict[str, str] = {}

    def model(self) -> torch.nn.Module:
        """The workload's model with the network to start from: rounding, or taught, if that was asked for."""
        import torch

        made, start = self.task.model(), self.start
        network = torch.load(start.network, weights_only=False)
        if start.rounds is not None:
            from slipway.compression import qat

            network = qat.prepare(network, torch.randn(start.example), start.rounds)
            self.places = qat.rounding(network, start.rounds)
        made.network = network
        if start.teacher is not None:
            from slipway.compression import distill

            return distill.Taught(made, torch.load(start.teacher, weights_only=False))
        return made

    def about(self) -> Mapping[str, Any]:
        """What the workload tells, and where the ranges are."""
        return {**self.task.about(), PLACES: self.places}

    def epoch(self, epoch: int, ranks: int) -> Sequence[Tensors]:
        """As the workload's."""
        return self.task.epoch(epoch, ranks)

    def count(self, batch: Tensors) -> int:
        """As the workload's."""
        return self.task.count(batch)

    def validate(self, model: torch.nn.Module, rank: int) -> tuple[float, int]:
        """As the workload's; ranges are not learned from validation data."""
        inner: Any = getattr(model, "student", model)
        rounded = [inner.network.get_submodule(place) for place in self.places.values()]
        for each in rounded:
            each.disable_observer()
        try:
            return self.task.validate(inner, rank)
        finally:
            for each in rounded:
                each.enable_observer()

    def figures(self, metric: float) -> Mapping[str, float]:
        """As the workload's."""
        return self.task.figures(metric)


@dataclass(frozen=True)
class Trained:
    """A network that was trained on."""

    weights: dict[str, Array]
    """State of the network by name, float32."""
    places: dict[str, str]
    """Where a network that rounds keeps its ranges."""


def key(params: Params, trained: Path) -> str:
    """Name of a search: equal for the same model, training and code, so that what was trained on is never mixed up."""
    known = (loop.key(params.workload, trained, params.train, params.model), params.compress.model_dump(include=TURNED))
    digest = hashlib.sha256(repr(known).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


class Tuner:
    """Trains compressed networks on, and keeps each until the search is over, so that a killed search goes on.

    Args:
        params: the workload, its data's training, and how long and fast.
        data: folder of the ingested data.
        work: folder that the networks are kept in.
    """

    def __init__(self, params: Params, data: Path, work: Path) -> None:
        self.params, self.data, self.work = params, data, work
        work.mkdir(parents=True, exist_ok=True)

    def save(self, network: torch.nn.Module, name: str) -> Path:
        """Save a network for `Start`."""
        import torch

        path = self.work / f"{name}.pt"
        with artifacts.writing(path) as beside:
            torch.save(network, beside)
        return path

    def train(self, name: str, start: Start) -> Trained:
        """Train a network on, unless a search that was killed did so already.

        Args:
            name: of the network, as a file's.
            start: what it starts from.
        """
        out = self.work / name
        if not (out / trained.MODEL).exists():
            checkpoints = self.work / f"{name}.checkpoints"
            with artifacts.writing(out) as beside:
                loop.train(
                    loop.Job(
                        self.params.workload,
                        self.data,
                        self.schedule(),
                        self.params.model,
                        checkpoints,
                        beside,
                        wrap=start,
                    )
                )
            loop.forget(checkpoints)
        stored, about = trained.read(out, self.params.workload)
        weights = {key.rpartition(PREFIX)[2]: value for key, value in stored.items() if PREFIX in key}
        return Trained(weights, about[PLACES])

    def schedule(self) -> TrainParams:
        """The workload's training, shorter and slower, by one process: ranges that are learned are not averaged."""
        compress, train = self.params.compress, self.params.train
        plain = TrainParams()
        return train.model_copy(
            update={
                "epochs": compress.finetune_epochs,
                "learning_rate": train.learning_rate * compress.finetune_rate,
                "world_size": 1,
                "zero": 0,
                "offload": "none",
                "precision": "fp32",
                "communication": plain.communication,
                "sparse": plain.sparse,
                "profile": False,
            }
        )
