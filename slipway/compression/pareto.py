"""What the search found: its variants, which of them no other one beats in everything, and which one is served."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from slipway.compression.gate import Quality


@dataclass(frozen=True)
class Variant:
    """One compressed model in its fastest engine, as it was measured here."""

    recipe: str
    precision: str
    engine: str
    metric: float
    """The workload's, on the validation samples that all variants answered; larger is better."""
    latency_ms: Mapping[int, float]
    """Median of one request by batch size, one thread."""
    size_bytes: int
    peak_bytes: int
    """Peak memory of a process that does nothing but run it."""
    added_bytes: int
    """Of that, what came after the interpreter and the engine's library were loaded."""
    speedup: Mapping[int, float] = field(default_factory=dict)
    """Latency of FP32 in its fastest engine over this one's, by batch size."""
    own_speedup: Mapping[int, float] = field(default_factory=dict)
    """Latency of FP32 in this variant's own engine over this one's, by batch size."""
    quality: Quality | None = None
    """None: FP32 itself, which the others are held against."""

    @property
    def speed(self) -> float:
        """Geometric mean of the speed-ups."""
        return math.prod(self.speedup.values()) ** (1 / max(1, len(self.speedup)))


def front(variants: Sequence[Variant]) -> list[str]:
    """Recipes that no other variant equals or beats in metric, every latency, size and peak memory at once."""
    costs = {v.recipe: (-v.metric, *v.latency_ms.values(), float(v.size_bytes), float(v.peak_bytes)) for v in variants}
    return [name for name, cost in costs.items() if not any(_beats(other, cost) for other in costs.values())]


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


@dataclass(frozen=True)
class Choice:
    """What is served, and why each of the others is not."""

    recipe: str
    reason: str
    refused: Mapping[str, str]
    """By recipe."""


def choose(variants: Sequence[Variant], min_speedup: float) -> Choice:
    """Take the fastest variant that passes the gate and gains enough at every batch size; else FP32.

    Args:
        variants: FP32, whose quality is None, and the others.
        min_speedup: least gain over FP32 at any batch size.
    """
    full = next(variant for variant in variants if variant.quality is None)
    refused = {v.recipe: reason for v in variants if v is not full and (reason := _refusal(v, min_speedup))}
    left = [v for v in variants if v is not full and v.recipe not in refused]
    if not left:
        told = "; ".join(f"{recipe} {reason}" for recipe, reason in refused.items())
        return Choice(full.recipe, told or "no recipe was tried", refused)
    best = max(left, key=lambda variant: variant.speed)
    refused |= {v.recipe: f"is slower than {best.recipe}" for v in left if v is not best}
    assert best.quality is not None  # it is not FP32
    reason = f"{best.recipe} loses {max(best.quality.overall.value, 0):.2%} of the metric and is {_told(best)}"
    return Choice(best.recipe, reason, refused)


def _refusal(variant: Variant, min_speedup: float) -> str:
    assert variant.quality is not None  # FP32 is not asked
    reasons = list(variant.quality.reasons)
    if min(variant.speedup.values()) < min_speedup:
        reasons.append(f"is {_told(variant)}, compress.min_speedup asks for {min_speedup:g}x")
    return "; ".join(reasons)


def _told(variant: Variant) -> str:
    return ", ".join(f"{gain:.2f}x as fast at batch {batch}" for batch, gain in variant.speedup.items())
