"""Which process trains which micro-batch of an epoch: each once, also when the number of processes changes in between.

A workload gives the micro-batches of an epoch in one order for all. A step takes the next ones of it, one a process;
so how far an epoch is done is one number, and any number of processes can go on from it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """One process's part of one step."""

    index: int
    """Micro-batch of the epoch's order."""
    weight: float
    """Factor of its loss: 1, more in a last step with micro-batches for some processes only, and 0 for the others.

    The mean over all processes is thus the mean over the micro-batches. A process without one repeats the last, with
    no effect, because the processes meet in every step.
    """
    seen: int
    """Micro-batches of the epoch that are done when all processes have done this step."""


def turns(count: int, seen: int, rank: int, ranks: int) -> list[Turn]:
    """List the turns of one process in the rest of an epoch; as many on every process.

    Args:
        count: micro-batches of the epoch.
        seen: how many of them were done before, by however many processes.
        rank: this process.
        ranks: number of processes.
    """
    return [_turn(count, first, rank, ranks) for first in range(seen, count, ranks)]


def _turn(count: int, first: int, rank: int, ranks: int) -> Turn:
    after = min(first + ranks, count)
    mine = first + rank
    return Turn(min(mine, count - 1), ranks / (after - first) if mine < count else 0.0, after)
