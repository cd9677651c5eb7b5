"""What the training loop needs of the ranker: samples, model, and the metric on validation data.

Leave-one-out: of each user the last item is for test, the one before for validation, the rest is trained on. A sample
is a window of at most `max_length` + 1 of a user's training items: all but the last go in, all but the first come out.
Windows of like length share a batch, because the model's cost grows with the longest one; the mean history of a shop
is short.
"""

# U users, E events, W windows, B batch, T time, N negatives, I items
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch

from slipway.config import TrainParams
from slipway.errors import DataError
from slipway.workloads.base import Tensors
from slipway.workloads.ranker import sequences
from slipway.workloads.ranker.metrics import gains
from slipway.workloads.ranker.model import Ranker
from slipway.workloads.ranker.params import RankerParams
from slipway.workloads.ranker.sequences import padded

Ints = npt.NDArray[np.int64]

HELD_OUT = 2  # events at the end of each user's sequence that are not trained on: validation, test
POOL = (
    32  # steps whose windows are sorted by length together: enough to cut padding, few enough to keep the order random
)
VALIDATION_USERS = 4096
VALIDATION_BATCH = 256


def windows(offsets: Ints, length: int) -> tuple[Ints, Ints]:
    """Cut every user's training events into windows, from the end, so that each event is a target once.

    Args:
        offsets: [U+1] where each user's events begin.
        length: most targets of a window.

    Returns:
        [W] begin and [W] end of the windows: events begin .. end - 1, of which the first is never a target.
    """
    first, last = offsets[:-1], offsets[1:] - HELD_OUT  # a user's training events
    targets = np.maximum(last - first - 1, 0)
    count = -(-targets // length)
    user = np.repeat(np.arange(len(count)), count)
    nth = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
    end = last[user] - nth * length
    return np.maximum(first[user], end - length - 1), end


@dataclass(frozen=True)
class Epoch(Sequence[Tensors]):
    """The micro-batches of one epoch, each made when it is asked for."""

    data: sequences.Sequences
    begin: Ints
    end: Ints
    batches: Sequence[Ints]
    """Windows of each."""
    negatives: int
    seed: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, index: int) -> Tensors: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensors]: ...
    def __getitem__(self, index: int | slice) -> Tensors | Sequence[Tensors]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        chosen = self.batches[index]
        rows = padded(self.data.items, self.begin[chosen], self.end[chosen])
        target = np.where(rows[:, :-1] > 0, rows[:, 1:], 0)
        return {"history_BT": rows[:, :-1], "target_BT": target, "negative_N": self._negatives(index)}

    def _negatives(self, index: int) -> Ints:
        items = self.data.item_count
        if self.negatives >= items:
            return np.arange(1, items + 1)  # all of them: the loss is the full softmax
        return np.random.default_rng([*self.seed, index]).integers(1, items + 1, size=self.negatives)


class RankerTask:
    """The ranker as the training loop sees it."""

    metric = "ndcg_at_10"
    unit = "sequences"

    def __init__(self, data: Path, train: TrainParams, params: RankerParams) -> None:
        self.data, self.train, self.params = sequences.load(data), train, params
        offsets = np.asarray(self.data.offsets)
        self.begin, self.end = windows(offsets, params.max_length)
        if len(self.begin) < train.world_size:
            raise DataError(
                f"{data}: {len(self.begin)} training sequences for {train.world_size} processes; "
                "give more users with 4 or more events, or lower train.world_size"
            )
        users = np.flatnonzero(np.diff(offsets) > HELD_OUT)
        rng = np.random.default_rng([train.seed, 1])
        self.validation = rng.permutation(users)[:VALIDATION_USERS]

    def model(self) -> torch.nn.Module:
        """Make the model; its weights come from torch's generator."""
        return Ranker(self.data.item_count, self.params)

    def about(self) -> dict[str, Any]:
        """What the export has to know beside the weights."""
        return {"items": self.data.item_count, **self.params.model_dump()}

    def epoch(self, epoch: int, ranks: int) -> Epoch:
        """Give the micro-batches of an epoch in the order of training; those of one step are of like length."""
        size = self.train.batch_size
        rng = np.random.default_rng([self.train.seed, 2, epoch])
        order = rng.permutation(len(self.begin))
        length = (self.end - self.begin)[order]
        pools = np.arange(len(order)) // (POOL * ranks * size)
        order = order[np.lexsort((length, pools))]
        batches = [order[at : at + size] for at in range(0, len(order), size)]
        steps = [batches[at : at + ranks] for at in range(0, len(batches), ranks)]
        # The last step may have micro-batches for some processes only: it stays last, so that no other one does.
        shuffled = [batch for i in rng.permutation(len(steps) - 1) for batch in steps[i]] + steps[-1]
        return Epoch(self.data, self.begin, self.end, shuffled, self.params.negatives, (self.train.seed, 3, epoch))

    def count(self, batch: Tensors) -> int:
        """Sequences in a batch."""
        return len(batch["history_BT"])

    def validate(self, model: torch.nn.Module, rank: int) -> tuple[float, int]:
        """Sum and count of NDCG@10 over all items, on this rank's share of a sample of the validation items."""
        assert isinstance(model, Ranker)
        users = self.validation[rank :: self.train.world_size]
        total = 0.0
        for at in range(0, len(users), VALIDATION_BATCH):
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


TASK = RankerTask
