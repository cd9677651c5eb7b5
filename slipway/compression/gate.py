"""The gate of a compressed model: is it shown to lose little, and is no part of the data shown to lose much?

Both models answer the same samples, so the loss is judged by the samples' own differences. What is lost is the relative
drop of the mean metric, 1 - mean(ours) / mean(full). Its bounds are Fieller's, of a ratio of two means of paired
values (Fieller 1954, doi:10.1111/j.2517-6161.1954.tb00159.x), after one more sample, the worst there can be for the
bound, was added: the full model right and the other wrong, or the reverse. That is the idea of Agresti and Min (2005,
doi:10.1002/sim.1781), who add half a pair of each kind: without it a few samples on which the models agree would prove
that they always do, and losses that are rare but large would be missed. Values lie in 0..1, so for 0/1 outcomes it is a
test of paired proportions. Simulated, it lets through a model that loses just too much as often as `confidence` says.

Overall the model must be shown non-inferior: the upper bound of its drop lies within `max_drop`. A slice can be too
small ever to show that, so it fails only where it is shown inferior: the lower bound lies beyond `max_drop`, at a
confidence that holds for all slices together (Bonferroni). In between a slice is open, and the report says so.
"""

# U samples
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from slipway.params import CompressParams

Floats = npt.NDArray[np.float64]
Masks = Mapping[str, npt.NDArray[Any]]
Verdict = Literal["kept", "open", "lost"]


@dataclass(frozen=True)
class Drop:
    """The relative loss of the metric on some samples."""

    count: int
    value: float
    """Negative for a gain."""
    low: float | None
    """One-sided bound at the confidence; None: unbounded, the samples are too few to tell anything."""
    high: float | None
    verdict: Verdict
    """kept: shown to lose at most `max_drop`; lost: shown to lose more; open: neither, for want of samples."""


@dataclass(frozen=True)
class Quality:
    """What a model loses, and whether that is little enough."""

    overall: Drop
    slices: dict[str, Drop] = field(default_factory=dict)
    overlap: float | None = None
    """Share of FP32's ten best answers among its own ten best; None: the workload does not rank."""
    reasons: tuple[str, ...] = ()
    """Why it does not pass; none: it passes."""


def judge(full: Floats, ours: Floats, masks: Masks, limits: CompressParams, overlap: float | None = None) -> Quality:
    """Hold a compressed model against the full one.

    Args:
        full: [U] metric of the full model on each sample, 0..1.
        ours: [U] metric of the compressed model on the same samples.
        masks: [U] by slice.
        limits: how much may be lost, and how sure that has to be.
        overlap: of the ten best answers with the full model's, where the workload ranks.
    """
    overall = drop(full, ours, limits.max_drop, limits.confidence)
    there = {name: mask for name, mask in masks.items() if mask.any()}
    each = 1 - (1 - limits.confidence) / max(1, len(there))
    slices = {name: drop(full[mask], ours[mask], limits.max_drop, each) for name, mask in there.items()}
    return Quality(overall, slices, overlap, tuple(_reasons(overall, slices, overlap, limits)))


def _reasons(overall: Drop, slices: Mapping[str, Drop], overlap: float | None, limits: CompressParams) -> list[str]:
    found = []
    allowed = f"compress.max_drop allows {limits.max_drop:.1%}"
    if overall.verdict == "lost":
        found.append(f"loses {overall.value:.1%} of the metric, {allowed}")
    if overall.verdict == "open":
        most = "any amount" if overall.high is None else f"{overall.high:.1%}"
        told = f"{'gains' if overall.value < 0 else 'loses'} {abs(overall.value):.1%} of the metric"
        found.append(
            f"{told}, but may lose {most} ({limits.confidence:.0%} sure, {overall.count:,} samples), {allowed}"
        )
    for name, each in slices.items():
        if each.verdict == "lost":
            found.append(f"loses {each.value:.1%} in the slice {name!r} ({each.count:,} samples), {allowed}")
    if overlap is not None and overlap < limits.min_overlap:
        found.append(
            f"shares {overlap:.1%} of the ten best answers, compress.min_overlap asks for {limits.min_overlap:g}"
        )
    return found


def drop(full: Floats, ours: Floats, most: float, confidence: float) -> Drop:
    """Judge the relative loss of the mean on paired samples.

    Args:
        full: [U] values of the full model, 0..1.
        ours: [U] values of the other on the same samples.
        most: largest loss that is allowed.
        confidence: of each bound.
    """
    value = 1 - float(ours.mean()) / float(full.mean()) if full.any() else 0.0
    low, high = bounds(full, ours, confidence)
    if high is not None and high <= most:
        return Drop(len(full), value, low, high, "kept")
    return Drop(len(full), value, low, high, "lost" if low is not None and low > most else "open")


def bounds(full: Floats, ours: Floats, confidence: float) -> tuple[float | None, float | None]:
    """Lower and upper bound of 1 - mean(ours) / mean(full), each at `confidence`; None where there is none."""
    won, lost = _ratios(full, ours, (0.0, 1.0), confidence), _ratios(full, ours, (1.0, 0.0), confidence)
    return 1 - won[1] if won else None, 1 - lost[0] if lost else None


def _ratios(full: Floats, ours: Floats, worst: tuple[float, float], confidence: float) -> tuple[float, float] | None:
    """Least and largest ratio of the means, ours to full, that the samples and the pair `worst` allow."""
    count = len(full) + 1
    mean_f, mean_o = (float(full.sum()) + worst[0]) / count, (float(ours.sum()) + worst[1]) / count
    share = NormalDist().inv_cdf(confidence) ** 2 / count
    # mean(ours) - r mean(full) is zero within its error for the ratios r between the roots of a r^2 - 2 b r + c
    a = mean_f**2 - share * ((float(full @ full) + worst[0]) / count - mean_f**2)
    b = mean_f * mean_o - share * (float(full @ ours) / count - mean_f * mean_o)
    c = mean_o**2 - share * ((float(ours @ ours) + worst[1]) / count - mean_o**2)
    if a <= 0:
        return None
    root = math.sqrt(max(0.0, b * b - a * c))
    return (b - root) / a, (b + root) / a
