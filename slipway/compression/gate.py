"""The gate of a compressed model: it is served only if it costs little quality and gains enough speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slipway.config import CompressParams


@dataclass(frozen=True)
class Decision:
    """What is served, and why."""

    precision: str
    """fp32 or int8."""
    reason: str
    drop: float
    """Relative loss of the metric, negative for a gain."""
    speedup: float
    """FP32 latency over INT8 latency, the least over the batch sizes."""


def decide(
    metric: Mapping[str, float], latency_ms: Mapping[str, Mapping[int, float]], limits: CompressParams
) -> Decision:
    """Hold INT8 against FP32.

    Args:
        metric: the workload's metric on validation data, by precision; larger is better.
        latency_ms: median latency by precision and batch size.
        limits: how much may be lost, how much must be won.
    """
    drop = 1 - metric["int8"] / metric["fp32"] if metric["fp32"] > 0 else 0.0
    gains = {batch: latency_ms["fp32"][batch] / latency_ms["int8"][batch] for batch in latency_ms["fp32"]}
    speedup = min(gains.values())
    told = ", ".join(f"{gain:.2f}x at batch {batch}" for batch, gain in gains.items())
    if drop > limits.max_drop:
        reason = f"INT8 loses {drop:.1%} of the metric, compress.max_drop allows {limits.max_drop:.1%}"
        return Decision("fp32", reason, drop, speedup)
    if speedup < limits.min_speedup:
        reason = f"INT8 is too little faster ({told}), compress.min_speedup asks for {limits.min_speedup:g}x"
        return Decision("fp32", reason, drop, speedup)
    return Decision("int8", f"INT8 loses {max(drop, 0):.2%} of the metric and is faster ({told})", drop, speedup)
