"""Windows of users' training events, and their order in an epoch: what memory this takes does not grow with the table.

Windows are found anew, a block of users at a time; what stays is how many each block has. An epoch shuffles all of them
together if they are few enough. Otherwise it takes blocks of users at random and shuffles a group of theirs at a time.
"""

# U users, W windows
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

HELD_OUT = 2  # events at the end of each user's sequence that are not trained on: validation, test
BLOCK = 1 << 10  # users that stay together where a table has more than one group
SCAN = 1 << 16  # users that are counted at once
GROUP = 1 << 17  # windows that are shuffled together; more where POOL steps hold more
POOL = 32  # steps whose windows are sorted by length together: enough to cut padding, few enough to stay random


def windows(offsets: Ints, length: int) -> tuple[Ints, Ints]:
    """Cut every user's training events into windows, from the end, so that each event is a target once.

    Args:
        offsets: [U+1] where each user's events begin.
        length: most targets of a window.

    Returns:
        [W] begin and [W] end of the windows: events begin .. end - 1, of which the first is never a target.
    """
    first, last = offsets[:-1], offsets[1:] - HELD_OUT  # a user's training events
    count = _counts(offsets, length)
    user = np.repeat(np.arange(len(count)), count)
    nth = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
    end = last[user] - nth * length
    return np.maximum(first[user], end - length - 1), end


def _counts(offsets: Ints, length: int) -> Ints:
    counts: Ints = -(-np.maximum(np.diff(offsets) - HELD_OUT - 1, 0) // length)
    return counts


class Windows:
    """All windows of a table."""

    def __init__(self, offsets: Ints, length: int) -> None:
        """Count them, a part of the table at a time.

        Args:
            offsets: [U+1] where each user's events begin; may be mapped into memory.
            length: most targets of a window.
        """
        self.offsets, self.length = offsets, length
        scans = [_counts(offsets[at : at + SCAN + 1], length) for at in range(0, len(offsets) - 1, SCAN)]
        self.counts = np.concatenate([np.add.reduceat(scan, np.arange(0, len(scan), BLOCK)) for scan in scans])
        """[U / BLOCK] windows of each block."""

    def __len__(self) -> int:
        return int(self.counts.sum())

    def of(self, blocks: Ints) -> tuple[Ints, Ints]:
        """Begin and end of the windows of these blocks, one block behind the other."""
        found = [windows(self.offsets[b * BLOCK : (b + 1) * BLOCK + 1], self.length) for b in blocks.tolist()]
        begin, end = zip(*found, strict=True)
        return np.concatenate(begin), np.concatenate(end)


@dataclass(frozen=True)
class _Group:
    """Windows that are shuffled together."""

    number: int
    begin: Ints
    end: Ints
    batches: list[Ints]
    """Windows of each micro-batch."""


class Order:
    """Micro-batches of an epoch in the order of training; those of one step are of like length."""

    def __init__(self, windows: Windows, size: int, ranks: int, seed: tuple[int, ...]) -> None:
        """Prepare.

        Args:
            windows: all windows.
            size: windows of a micro-batch.
            ranks: micro-batches of a step.
            seed: seed of this epoch.
        """
        self.windows, self.size, self.ranks, self.seed = windows, size, ranks, seed
        pool = POOL * ranks * size
        self.together = pool * max(1, GROUP // pool)
        blocks = np.arange(len(windows.counts))
        self.total = len(windows)
        self.blocks = blocks if self.total <= self.together else np.random.default_rng([*seed, 1]).permutation(blocks)
        self.ends = np.cumsum(windows.counts[self.blocks])
        self._group: _Group | None = None

    def __len__(self) -> int:
        return -(-self.total // self.size)

    def __getitem__(self, index: int) -> tuple[Ints, Ints]:
        """Begin and end of the windows of one micro-batch; quick where indices rise."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, within = divmod(index, self.together // self.size)
        group = self._group  # one reference: another thread may replace it meanwhile
        if group is None or group.number != number:
            group = self._group = self._shuffled(number)
        chosen = group.batches[within]
        return group.begin[chosen], group.end[chosen]

    def _shuffled(self, number: int) -> _Group:
        begin, end = self._part(number * self.together, min((number + 1) * self.together, self.total))
        rng = np.random.default_rng([*self.seed, 0, number] if number else list(self.seed))
        order = rng.permutation(len(begin))
        pools = np.arange(len(order)) // (POOL * self.ranks * self.size)
        order = order[np.lexsort(((end - begin)[order], pools))]
        batches = [order[at : at + self.size] for at in range(0, len(order), self.size)]
        steps = [batches[at : at + self.ranks] for at in range(0, len(batches), self.ranks)]
        # The last step may have micro-batches for some processes only: it stays last, so that no other one does.
        shuffled = [batch for i in rng.permutation(len(steps) - 1) for batch in steps[i]] + steps[-1]
        return _Group(number, begin, end, shuffled)

    def _part(self, first: int, last: int) -> tuple[Ints, Ints]:
        """Windows first .. last - 1, counted through the blocks in their order."""
        low, high = np.searchsorted(self.ends, first, "right"), np.searchsorted(self.ends, last, "left")
        begin, end = self.windows.of(self.blocks[low : high + 1])
        skipped = first - (int(self.ends[low - 1]) if low else 0)
        return begin[skipped : skipped + last - first], end[skipped : skipped + last - first]
