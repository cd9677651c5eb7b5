"""Whether what the model answers drifts: how its scores spread over the deciles that they had when it was sealed.

A sample's score is the largest value of the last output that its endpoint reads. A kept answer bears its tenth, so that
each answer counts, wherever it came from. The package bears the nine deciles of
held-out requests; the replica counts which tenth a score falls into. Rules sum the counts over the replicas and compare
them with a tenth each by the population stability index: under .1 nothing, over .25 the users or the data are others.

Source: Siddiqi 2006, Credit Risk Scorecards (the index and its limits).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from slipway.workloads.base import Endpoint, Query, Tensors

EVERY = 8
"""One sample of so many is looked at, so that it costs a fraction of a microsecond."""
BATCH = 8

Run = Callable[[Sequence[str], Tensors], Sequence[Any]]
"""Runs the model: outputs by name, for inputs with a batch dimension."""


def deciles(endpoint: Endpoint, run: Run, queries: Sequence[Query]) -> tuple[float, ...]:
    """The nine deciles of the scores of `queries`; none if the scores are too much alike to have any."""
    name = endpoint.outputs[-1]
    scores: list[float] = []
    for at in range(0, len(queries), BATCH):
        (rows,) = run([name], endpoint.collate(queries[at : at + BATCH]))
        scores += np.asarray(rows).reshape(len(rows), -1).max(axis=1).tolist()
    scores = [score for score in scores if math.isfinite(score)]  # without an answer it is minus infinity
    bounds = np.quantile(scores, np.arange(1, 10) / 10) if scores else np.zeros(9)
    return tuple(float(f"{bound:.9g}") for bound in bounds) if (np.diff(bounds) > 0).all() else ()


class Watch:
    """Counts the tenths that scores fall into.

    Args:
        bounds: the deciles of the package; without any nothing is counted.
        output: name of the output that holds scores.
        count: one function a tenth.
    """

    def __init__(self, bounds: Sequence[float], output: str, count: Sequence[Callable[[], None]]) -> None:
        self._bounds, self._output, self._count = bounds, output, count
        self._turn = 0

    def due(self) -> bool:
        """Whether this answer is to be counted: each `EVERY`th is."""
        self._turn += 1
        return self._turn % EVERY == 0 and bool(self._bounds)

    def tenth(self, outputs: Tensors) -> int:
        """Which tenth an answer's score falls into (0..9); -1 without deciles."""
        return bisect_left(self._bounds, float(outputs[self._output].max())) if self._bounds else -1

    def count(self, tenth: int) -> None:
        """Count one answer; -1 is none."""
        if tenth >= 0:
            self._count[tenth]()
