"""What the training loop needs of the classifier: varied pictures, the network, and its accuracy on validation data.

Training may begin with small pictures and end with larger ones (progressive resizing): early epochs cost less, late
ones see the details. They may end smaller than those that are served: what is cut out of a picture looks larger than in
the whole one, which a larger whole one makes up for (Touvron et al. 2019, arXiv:1906.06423).
"""

# N pictures of a part, B batch
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from slipway import artifacts
from slipway.errors import DataError
from slipway.params import TrainParams
from slipway.workloads.base import Batches, Tensors
from slipway.workloads.classifier import augmentation, images, pretrained
from slipway.workloads.classifier.model import Network, Training
from slipway.workloads.classifier.params import ClassifierParams

Ints = npt.NDArray[np.int64]

VALIDATION_BATCH = 64
GROWN = 2 / 3  # share of the epochs after which the pictures have their full size
LEAST = 2  # pictures of a batch: the statistics of one alone are none
GRAIN = 16  # sides of growing pictures are multiples of it: few shapes, which convolutions are prepared for


@dataclass(frozen=True)
class Epoch(Batches):
    """The micro-batches of one epoch."""

    data: images.Images
    order: Ints
    """[N] positions of the training pictures, each as often as it is seen."""
    batches: int
    """Of nearly equal size: a last one that is small would have poor statistics."""
    side: int
    """Of the pictures made."""
    params: ClassifierParams
    seed: tuple[int, ...]

    def __len__(self) -> int:
        return self.batches

    def make(self, index: int) -> Tensors:
        """Make one of them."""
        at = np.array_split(self.order, self.batches)[index]
        rng = np.random.default_rng([*self.seed, index])
        return augmentation.batch(self.data.pixels(at), self.data.labels[at], self.side, self.params.augment, rng)


def side(full: int, shares: tuple[float, float], done: float) -> int:
    """Side of the training pictures when a share `done` of the epochs is over.

    Args:
        full: of the pictures that are served.
        shares: of it, that training begins and ends with.
        done: 0..1.
    """
    begin, end = shares
    wanted = full * (begin + (end - begin) * min(1.0, done / GROWN))
    return full if wanted == full else min(full, max(GRAIN, round(wanted / GRAIN) * GRAIN))


class ClassifierTask:
    """The classifier as the training loop sees it."""

    metric = "top1"
    unit = "images"

    def __init__(self, data: Path, train: TrainParams, params: ClassifierParams) -> None:
        self.data, self.train, self.params = images.load(data), train, params
        self.training, self.validation = self.data.of("train"), self.data.of("validation")
        seen = len(self.training) * params.repeats
        if seen < LEAST * train.world_size or not len(self.validation):
            raise DataError(
                f"{data}: {len(self.training)} training and {len(self.validation)} validation pictures are too few for "
                f"{train.world_size} processes; give more pictures, or lower train.world_size"
            )

    def model(self) -> torch.nn.Module:
        """Make the model; its weights come from torch's generator, or from a file."""
        given = self.params
        made = Network(len(self.data.classes), self.data.image_size, given.width, given.blocks, given.dropout)
        if given.weights:
            pretrained.load(made, Path(given.weights))
        return Training(made, given.smoothing)

    def about(self) -> dict[str, Any]:
        """What the export has to know beside the weights."""
        file = self.params.weights
        return {
            "classes": list(self.data.classes),
            "image_size": self.data.image_size,
            "stored_size": self.data.stored_size,
            "started_from": {"weights": file, "sha256": artifacts.sha256(Path(file))} if file else None,
            **self.params.model_dump(exclude={"weights"}, mode="json"),
        }

    def epoch(self, epoch: int, ranks: int) -> Epoch:
        """Give the micro-batches of an epoch in the order of training; all cost the same, and there is one for each."""
        rng = np.random.default_rng([self.train.seed, 2, epoch])
        order = np.concatenate([rng.permutation(self.training) for _ in range(self.params.repeats)])
        pixels = side(self.data.image_size, self.params.sides, epoch / self.train.epochs)
        batches = max(ranks, -(-len(order) // self.train.batch_size))
        return Epoch(self.data, order, batches, pixels, self.params, (self.train.seed, 3, epoch))

    def count(self, batch: Tensors) -> int:
        """Pictures in a batch."""
        return len(batch["label_B"])

    def validate(self, model: torch.nn.Module, rank: int) -> tuple[float, int]:
        """Hits and number of this rank's share of the validation pictures."""
        assert isinstance(model, Training)
        ranks, hits = self.train.world_size, 0
        mine = self.validation[rank::ranks]
        device = next(model.parameters()).device
        for at in range(0, -(-len(self.validation) // ranks), VALIDATION_BATCH):
            # As many batches on every rank, of one picture at least, which then counts nothing.
            rows = mine[at : at + VALIDATION_BATCH]
            shown = self.data.pixels(rows if len(rows) else self.validation[:1])
            seen = augmentation.views(shown, self.data.image_size)
            best = model.logits(torch.from_numpy(seen).to(device)).argmax(1).cpu().numpy()
            hits += int((best[: len(rows)] == self.data.labels[rows]).sum())
        return float(hits), len(mine)

    def figures(self, metric: float) -> Mapping[str, float]:
        """Nothing beside it."""
        return {}


TASK = ClassifierTask
