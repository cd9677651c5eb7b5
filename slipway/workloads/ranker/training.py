"""What the training loop needs of the ranker: samples, model, and the metric on validation data.

Leave-one-out: of each user the last item is for test, the one before for validation, the rest is trained on. A sample
is a window of at most `max_length` + 1 of a user's training items: all but the last go in, all but the first come out.
Windows of like length share a batch, because the model's cost grows with the longest one; the mean history of a shop
is short.

The items that a batch compares are its own targets and some drawn uniformly (mixed negatives: Yang et al. 2020,
doi:10.1145/3366424.3386195). A popular item is among them nearly always, a rare one seldom; its logit is raised by
minus the logarithm of the chance that it is (Bengio and Senécal 2008, doi:10.1109/TNN.2007.912312), so that the sum
under the softmax is, in the mean, that over all items.
"""

# U users, E events, B batch, T time, N negatives, I items
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from slipway.errors import DataError
from slipway.params import TrainParams
from slipway.workloads.base import Batches, Tensors
from slipway.workloads.ranker import sequences
from slipway.workloads.ranker.metrics import gains
from slipway.workloads.ranker.model import Ranker
from slipway.workloads.ranker.params import RankerParams
from slipway.workloads.ranker.sequences import padded
from slipway.workloads.ranker.windows import GROUP, HELD_OUT, Order, Windows

Ints = npt.NDArray[np.int64]

USERS = 65_536  # users that are counted at a time
VALIDATION_USERS = 4096
VALIDATION_BATCH = 256


@dataclass(frozen=True)
class Epoch(Batches):
    """The micro-batches of one epoch."""

    data: sequences.Sequences
    order: Order
    popularity: npt.NDArray[np.float64]
    """[I+1] share of the targets that each item is."""
    negatives: int
    seed: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.order)

    def make(self, index: int) -> Tensors:
        """Make one of them."""
        rows = padded(self.data.items, *self.order[index])
        target = np.where(rows[:, :-1] > 0, rows[:, 1:], 0)
        item, bias = self._compared(target[target > 0], index)
        return {"history_BT": rows[:, :-1], "target_BT": target, "item_N": item, "bias_N": bias}

    def _compared(self, targets: Ints, index: int) -> tuple[Ints, npt.NDArray[np.float32]]:
        """Items that the loss compares, and what it adds to their logits."""
        items = self.data.item_count
        if self.negatives >= items:
            return np.arange(1, items + 1), np.zeros(items, np.float32)  # the full softmax
        rng = np.random.default_rng([*self.seed, index])
        drawn = rng.choice(items, size=self.negatives, replace=False, shuffle=False) + 1
        compared = np.union1d(targets, drawn)
        absent = (1 - self.popularity[compared]) ** len(targets) * (1 - self.negatives / items)
        return compared, -np.log1p(-absent).astype(np.float32)


def popularity(data: sequences.Sequences) -> npt.NDArray[np.float64]:
    """Share of the training targets that each item is: [I+1]; a user's first and held-out events are none."""
    counts = np.concatenate([[0], data.item_events])
    for at in range(0, len(data.offsets) - 1, USERS):  # in parts: memory does not grow with the table
        ends = data.offsets[at : at + USERS + 1]
        for place in (ends[:-1], *(ends[1:] - held for held in range(1, HELD_OUT + 1))):
            counts -= np.bincount(data.items[place], minlength=len(counts))
    shares: npt.NDArray[np.float64] = np.maximum(counts, 0) / max(1, counts.sum())
    return shares


class RankerTask:
    """The ranker as the training loop sees it."""

    metric = "ndcg_at_10"
    unit = "sequences"

    def __init__(self, data: Path, train: TrainParams, params: RankerParams) -> None:
        self.data, self.train, self.params = sequences.load(data), train, params
        self.windows = Windows(self.data.offsets, params.max_length)
        if len(self.windows) < train.world_size:
            raise DataError(
                f"{data}: {len(self.windows)} training sequences for {train.world_size} processes; "
                "give more users with 4 or more events, or lower train.world_size"
            )
        self.popularity = popularity(self.data)
        self.validation = _sample(self.data.offsets, np.random.default_rng([train.seed, 1]))

    def model(self) -> torch.nn.Module:
        """Make the model; its weights come from torch's generator."""
        return Ranker(self.data.item_count, self.params)

    def about(self) -> dict[str, Any]:
        """What the export has to know beside the weights."""
        return {"items": self.data.item_count, **self.params.model_dump()}

    def epoch(self, epoch: int, ranks: int) -> Epoch:
        """Give the micro-batches of an epoch in the order of training; those of one step are of like length."""
        order = Order(self.windows, self.train.batch_size, ranks, (self.train.seed, 2, epoch))
        return Epoch(self.data, order, self.popularity, self.params.negatives, (self.train.seed, 3, epoch))

    def count(self, batch: Tensors) -> int:
        """Sequences in a batch."""
        return len(batch["history_BT"])

    def validate(self, model: torch.nn.Module, rank: int) -> tuple[float, int]:
        """Sum and count of NDCG@10 over all items, on this rank's share of a sample of the validation items."""
        assert isinstance(model, Ranker)
        ranks, total = self.train.world_size, 0.0
        users = self.validation[rank::ranks]
        for at in range(0, -(-len(self.validation) // ranks), VALIDATION_BATCH):  # of some ranks the last is empty
            total += self._gain(model, users[at : at + VALIDATION_BATCH])
        return total, len(users)

    def figures(self, metric: float) -> Mapping[str, float]:
        """Nothing beside it."""
        return {}

    def _gain(self, model: Ranker, users: Ints) -> float:
        offsets = self.data.offsets
        begin, end = offsets[users], offsets[users + 1] - HELD_OUT
        history = torch.from_numpy(padded(self.data.items, begin, end, self.params.max_length))
        truth = torch.from_numpy(self.data.items[end].astype(np.int64))[:, None]
        device = model.item.weight.device
        logits = model.logits(history.to(device)).float().cpu()
        logits.scatter_(1, history, -torch.inf)[:, 0] = -torch.inf
        ahead = (logits > logits.gather(1, truth)).sum(1).numpy()
        return float(gains(ahead).sum())


def _sample(offsets: Ints, rng: np.random.Generator) -> Ints:
    """Draw users to validate on, of those that have more events than are held out."""
    count = len(offsets) - 1
    few = count <= GROUP
    users = np.arange(count) if few else rng.choice(count, 2 * VALIDATION_USERS, replace=False)
    users = users[offsets[users + 1] - offsets[users] > HELD_OUT]
    return (rng.permutation(users) if few else users)[:VALIDATION_USERS]


TASK = RankerTask
