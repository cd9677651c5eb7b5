"""Scores of a candidate and the gates they have to pass."""

# U samples
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slipway.params import EvaluateParams

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Gate:
    """One limit, and whether the candidate keeps it."""

    name: str
    value: float | None
    """What was measured; None: nothing to compare with."""
    limit: float
    passed: bool


@dataclass(frozen=True)
class Champion:
    """The model that serves everybody, on the candidate's samples."""

    version: str
    metric: float
    difference: float
    """Candidate minus champion."""
    low: float
    high: float
    """95 % interval of the difference, paired by sample."""


def means(values: Mapping[str, Floats]) -> dict[str, float]:
    """Mean of every metric over the samples."""
    return {name: round(float(value.mean()), 6) for name, value in values.items()}


def against(version: str, candidate: Floats, champion: Floats) -> Champion:
    """Compare two models on the same samples, [U] each; chance is judged by the samples' own differences."""
    return Champion(version, float(champion.mean()), *difference(candidate, champion))


def difference(ours: Floats, theirs: Floats) -> tuple[float, float, float]:
    """Mean difference on the same samples, [U] each, and its 95 % interval: value, low, high."""
    each = ours - theirs
    half = 1.96 * float(each.std()) / max(1.0, len(each) ** 0.5)
    mean = float(each.mean())
    return mean, mean - half, mean + half


def interval(values: Floats) -> tuple[float, float]:
    """95 % interval of a mean: Wilson's for values in 0..1, with the variance at its largest; else the normal one."""
    count, mean, z = len(values), float(values.mean()), 1.96
    if values.min() < 0 or values.max() > 1:
        half = z * float(values.std()) / math.sqrt(count)
        return mean - half, mean + half
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    # At 0 and 1 rounding would leave the mean itself a hair outside.
    return min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half))


def gates(limits: EvaluateParams, metric: float, champion: Champion | None, p99_ms: float) -> list[Gate]:
    """Hold a candidate against the limits of `evaluate`; without a champion there is nothing to lose against."""
    drop = 1 - metric / champion.metric if champion is not None and champion.metric > 0 else None
    return [
        Gate("min_metric", metric, limits.min_metric, metric >= limits.min_metric),
        Gate("max_champion_drop", drop, limits.max_champion_drop, drop is None or drop <= limits.max_champion_drop),
        Gate("max_latency_ms", p99_ms, limits.max_latency_ms, p99_ms <= limits.max_latency_ms),
    ]
