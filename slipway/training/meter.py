"""The figures of a run, taken every second or two: speed, utilisation, gradient, memory, traffic, where time goes.

    loss, learning_rate, grad_norm      means over the steps since the figures before; grad_norm, before it is clipped,
                                        is the largest of them
    loss_scale, skipped_steps           of fp16: the scale in force, steps left out for an overflow so far
    UNIT_per_s, mfu                     speed of all processes, and model FLOPs over the measured peak; the time of
                                        validation and checkpoints is left out, from mfu also the few steps whose
                                        operations are being counted, which are slow: it is missing where all are
    data_share ... checkpoint_share     share of the time in each part of `watch.PARTS`; data_share is what the model
                                        waited for its batches
    sent_bytes_per_step                 bytes that rank 0 sent, as in a ring (collectives.py); where communication.py
                                        averages the gradients, those alone that left its node
    rss_bytes, device_bytes             memory of rank 0's process, and the most that its accelerator held
    ...                                 what techniques tell through `watch.gauge`

Every process takes them, because all go the same way; rank 0's are shown.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slipway.training import flops, watch
from slipway.workloads.base import Tensors

OFTEN_S, SELDOM_S = 0.25, 2.0  # a short run is told in as many points as a long one
AGAIN = 20  # samples with which the peak is measured again
KEPT = 240  # samples that a run keeps for its report; past that every second one goes


@dataclass(frozen=True)
class Sample:
    """The figures of a few steps."""

    step: int
    """Steps done."""
    at_ms: int
    """Wall clock."""
    seconds: float
    """Time in training so far."""
    figures: dict[str, float]


class Meter:
    """Counts what a process does and makes samples of it; travels with the checkpoints."""

    def __init__(self, unit: str, precision: str, device: torch.device, tell: Callable[[Sample], None]) -> None:
        """Measure the peak, for 0.2 s, and on processors for some ms with each of the first samples.

        Args:
            unit: what the speed is told in, such as tokens.
            precision: arithmetic of training.
            device: where it runs.
            tell: called with every sample; must not wait.
        """
        self.peak = flops.peak(precision, device)
        self.samples: list[Sample] = []
        self._unit, self._device, self._precision, self._tell = unit, device, precision, tell
        self._flops = flops.Counter()
        self._counts = dict.fromkeys(("steps", "losses", "loss", "rate", "units", "skipped"), 0.0)
        self._looked = dict.fromkeys(("looked_steps", "looked_s", "looked_flops"), 0.0)  # operations being counted
        self._norm, self._scale = 0.0, 0.0
        self._step_began, self._step_flops = _training_s(), 0.0
        self._before = {key: -value for key, value in self._now().items()}
        self._last = self.totals()

    def counting(self, batch: Tensors) -> AbstractContextManager[None]:
        """Inside run forward and backward on `batch`, so that their operations are counted."""
        return self._flops.counting(batch)

    def step(
        self,
        loss: float,
        units: int,
        norm: float | None,
        rate: float,
        scale: float | None = None,
        skipped: bool = False,
    ) -> None:
        """Count a step.

        Args:
            loss: of this process; one that is not finite is left out.
            units: of all processes.
            norm: of the gradient, before it is clipped.
            rate: learning rate.
            scale: fp16's loss scale.
            skipped: fp16 left the step out.
        """
        finite = math.isfinite(loss)
        counted = {"steps": 1, "losses": finite, "loss": loss if finite else 0.0, "rate": rate, "units": units}
        for key, value in {**counted, "skipped": skipped}.items():
            self._counts[key] += value
        now, operations = _training_s(), self._flops.total
        if self._flops.looked:
            self._looked["looked_steps"] += 1
            self._looked["looked_s"] += now - self._step_began
            self._looked["looked_flops"] += operations - self._step_flops
        self._step_began, self._step_flops = now, operations
        self._norm, self._scale = max(self._norm, norm or 0.0), scale or 0.0
        passed = time.perf_counter() + self._before["seconds"]
        if passed - self._last["seconds"] >= min(SELDOM_S, max(OFTEN_S, passed / 40)):
            self.sample()

    def sample(self) -> None:
        """Take a sample of the steps since the one before."""
        totals = self.totals()
        new = {key: value - self._last[key] for key, value in totals.items()}
        if new["steps"] == 0:
            return
        if self._device.type == "cpu" and len(self.samples) < AGAIN:  # others may have had the processors at first
            self.peak = max(self.peak, flops.peak(self._precision, self._device, 0.0))
        figures = {k: float(f"{v:.6g}") for k, v in self._figures(new, totals).items() if math.isfinite(v)}
        sample = Sample(round(totals["steps"]), int(time.time() * 1000), round(totals["seconds"], 3), figures)
        self._last, self._norm = totals, 0.0
        self._tell(sample)
        self.samples.append(sample)
        if len(self.samples) > KEPT:
            del self.samples[-2::-2]  # the last one stays

    def _figures(self, new: Mapping[str, float], totals: Mapping[str, float]) -> dict[str, float]:
        working = _working(new)
        found = {
            "loss": new["loss"] / new["losses"] if new["losses"] else math.nan,
            "learning_rate": new["rate"] / new["steps"],
            "grad_norm": self._norm or math.nan,  # all steps were skipped
            f"{self._unit}_per_s": new["units"] / working,
            "mfu": self._mfu(new),
            **{f"{name}_share": new[name] / new["seconds"] for name in watch.PARTS},
            "sent_bytes_per_step": new["sent_bytes"] / new["steps"],
            "rss_bytes": _resident_bytes(),
        }
        if self._device.type != "cpu":
            found["device_bytes"] = torch.accelerator.max_memory_allocated(self._device)
        if self._scale:
            found |= {"loss_scale": self._scale, "skipped_steps": totals["skipped"]}
        return found | watch.gauges()

    def _mfu(self, sums: Mapping[str, float]) -> float:
        """Utilisation in the steps that were not slowed by counting; not a number where there are none."""
        if sums["steps"] == sums["looked_steps"]:
            return math.nan
        operations, seconds = sums["flops"] - sums["looked_flops"], _working(sums) - sums["looked_s"]
        return operations / max(1e-9, seconds) / self.peak

    def totals(self) -> dict[str, float]:
        """Sums over the whole run: seconds, steps, units, flops, sent_bytes, skipped steps, seconds in every part."""
        return {key: self._before[key] + value for key, value in self._now().items()}

    def _now(self) -> dict[str, float]:
        own = {"seconds": time.perf_counter(), "sent_bytes": watch.sent_bytes(), "flops": self._flops.total}
        return {**own, **self._counts, **self._looked, **watch.spent()}

    def report(self) -> dict[str, Any]:
        """What reports/train.json tells of the run as a whole, and its samples."""
        totals = self.totals()
        mfu = self._mfu(totals)
        if math.isnan(mfu):  # a run of a few steps
            mfu = totals["flops"] / _working(totals) / self.peak
        shares = {name: totals[name] / totals["seconds"] for name in watch.PARTS}
        return {
            "unit": self._unit,
            "mfu": round(mfu, 4),
            "peak_flops_per_s": round(self.peak),
            "flops_per_step": round(totals["flops"] / max(1.0, totals["steps"])),
            "sent_bytes_per_step": round(totals["sent_bytes"] / max(1.0, totals["steps"])),
            "rss_bytes": max((s.figures["rss_bytes"] for s in self.samples), default=_resident_bytes()),
            "skipped_steps": round(totals["skipped"]),
            "time_share": {
                name: round(share, 4) for name, share in {**shares, "other": 1 - sum(shares.values())}.items()
            },
            "history": [{"step": s.step, "at_ms": s.at_ms, "seconds": s.seconds, **s.figures} for s in self.samples],
        }

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs."""
        return {"totals": self.totals(), "samples": [vars(sample) for sample in self.samples]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`: the time between is left out."""
        now = self._now()
        self._before = {key: state["totals"].get(key, 0.0) - value for key, value in now.items()}
        self._last = self.totals()
        self.samples = [Sample(**sample) for sample in state["samples"]]


def _working(sums: Mapping[str, float]) -> float:
    return max(1e-9, sums["seconds"] - sums["validation"] - sums["checkpoint"])


def _training_s() -> float:
    """The clock, which stands still in validation and checkpoints."""
    spent = watch.spent()
    return time.perf_counter() - spent["validation"] - spent["checkpoint"]


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
