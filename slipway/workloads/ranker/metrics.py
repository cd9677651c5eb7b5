"""How well the next item is ranked: hit ratio and NDCG at 10, over all items and among sampled negatives."""

# B users, K items shown, N negatives, I items, H events of a history
from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer[Any]]

TOP = 10
SAMPLED = 100  # negatives of the sampled metric, as published
MISSED = 1 << 30  # rank of an item that was not shown at all


def shown_ranks(items_BK: Ints, truth_B: Ints) -> Ints:
    """Rank (0 is best) of the true item among those that were shown; MISSED where it was not."""
    found_BK = items_BK == truth_B[:, None]
    return np.where(found_BK.any(1), found_BK.argmax(1), MISSED)


def sampled_ranks(logits_BI: npt.NDArray[np.floating[Any]], truth_B: Ints, negative_BN: Ints) -> Ints:
    """Rank (0 is best) of the true item among the negatives; ties count against it, id 0 is no negative."""
    negative = np.take_along_axis(logits_BI, negative_BN, 1)
    positive = np.take_along_axis(logits_BI, truth_B[:, None], 1)
    ranks: Ints = ((negative >= positive) & (negative_BN > 0)).sum(1)
    return ranks


def draw_negatives(rng: np.random.Generator, seen_BH: Ints, items: int, count: int = SAMPLED) -> Ints:
    """Draw `count` items a user that the user has not seen, uniformly, with replacement.

    Args:
        rng: source of chance.
        seen_BH: all items of each user, the true next one among them; 0 is padding.
        items: number of items.
        count: negatives a user.

    Returns:
        [B, count] item ids; 0 where a user has seen nearly everything.
    """
    negative_BN = rng.integers(1, items + 1, size=(len(seen_BH), count))
    bad = _seen(negative_BN, seen_BH)
    for _ in range(64):
        if not bad.any():
            return negative_BN
        negative_BN[bad] = rng.integers(1, items + 1, size=int(bad.sum()))
        bad = _seen(negative_BN, seen_BH)
    negative_BN[bad] = 0
    return negative_BN


def _seen(negative_BN: Ints, seen_BH: Ints) -> npt.NDArray[np.bool_]:
    bad = np.zeros(negative_BN.shape, dtype=bool)
    for column in seen_BH.T:  # a loop over the history keeps the comparison at [B, N]
        bad |= negative_BN == column[:, None]
    return bad


def hits(ranks_B: Ints) -> Floats:
    """HR@10 of each user: 1 where the true item is among the first ten."""
    return (ranks_B < TOP).astype(np.float64)


def gains(ranks_B: Ints) -> Floats:
    """NDCG@10 of each user, which has one true item: 1 / log2(rank + 2) within the first ten."""
    return np.where(ranks_B < TOP, 1.0 / np.log2(np.minimum(ranks_B, TOP) + 2.0), 0.0)
