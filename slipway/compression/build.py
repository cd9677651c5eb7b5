"""From a recipe to a model: what each technique asks of the workload, and what it gives back, as ONNX."""

from __future__ import annotations

from typing import Any

from slipway.compression import engine
from slipway.compression.recipes import Recipe


def calibrated(export: Any, samples: int, seed: int) -> bytes:
    """The model in INT8, its ranges read from `samples` training samples."""
    probe, layers = export.probe()
    return bytes(
        export.int8(engine.ranges(engine.load(probe, "probe"), layers, list(export.calibration(samples, seed))))
    )


def build(recipe: Recipe, export: Any, samples: int, seed: int) -> bytes:
    """Make the model of a recipe that trains nothing."""
    if recipe.precision == "int8":
        return calibrated(export, samples, seed)
    return bytes(export.fp32())  # bf16 is the engine's work
