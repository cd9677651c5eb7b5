"""From a recipe to a model: what each technique asks of the workload's export, and what it gives back, as ONNX.

A workload that offers `tuned`, `prune`, `distill` or `qat` has in its export, beside what base.py says of all:

    network()           the trained network as a torch module, whose state has the names of `weights`
    example()           shape of an input of the network, with a batch of 2
    rounded()           for qat: path of a module of the network -> name of its output among the ranges of int8()
    having(weights)     the same export with other weights, whose layers may have fewer channels
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slipway.compression import engine
from slipway.compression.finetune import Start, Tuner
from slipway.compression.recipes import Recipe
from slipway.workloads.base import Array


def build(recipe: Recipe, export: Any, tuner: Tuner, samples: int, seed: int) -> bytes:
    """Make the model of a recipe.

    Args:
        recipe: what is done.
        export: the workload's, of the model as it was trained.
        tuner: trains networks on.
        samples: training samples that ranges are read from, where they are not learned.
        seed: of those samples.
    """
    network: Any = export.network() if recipe.finetunes else None
    teacher = tuner.save(network, "full") if recipe.taught else None
    if recipe.tuned:
        export = export.having(tuner.train("tuned", Start(tuner.save(network, "tuned"))).weights)
    if recipe.share > 0:
        export = export.having(_pruned(recipe, network, export.example(), tuner, teacher))
    if recipe.trained:
        return _rounded(recipe, network, export, tuner, teacher)
    if recipe.precision == "int8":
        return calibrated(export, samples, seed)
    return bytes(export.fp32())  # bf16 is the engine's work


def calibrated(export: Any, samples: int, seed: int) -> bytes:
    """The model in INT8, its ranges read from `samples` training samples."""
    probe, layers = export.probe()
    ranges = engine.ranges(engine.load(probe, "probe"), layers, list(export.calibration(samples, seed)))
    return bytes(export.int8(ranges))


def _pruned(
    recipe: Recipe, network: Any, shape: tuple[int, ...], tuner: Tuner, teacher: Path | None
) -> dict[str, Array]:
    """Take channels out of `network`, in place, and train it after each step; its weights in the end."""
    import torch

    from slipway.compression import prune

    name = recipe.name.removesuffix("-int8").removesuffix("-qat")
    state: dict[str, Array] = {}
    for step in prune.prune(network, torch.randn(shape), recipe.share):
        stage = f"{name}.{step}"
        state = tuner.train(stage, Start(tuner.save(network, stage), teacher)).weights
        network.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    return state


def _rounded(recipe: Recipe, network: Any, export: Any, tuner: Tuner, teacher: Path | None) -> bytes:
    """The model in INT8, its weights and ranges learned."""
    from slipway.compression import qat

    start = Start(tuner.save(network, recipe.name), teacher, export.rounded(), export.example())
    trained = tuner.train(f"{recipe.name}.rounding", start)
    return bytes(export.having(trained.weights).int8(qat.ranges(trained.weights, trained.places)))
