"""The search: every recipe becomes a model, each in its fastest engine is held against FP32, and one is chosen.

A form is a recipe's model in one engine. Forms are timed in turn on the same requests, so that a busy machine is
equally busy for all; the fastest engine of a recipe is the one that its variant is scored in.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from slipway import package
from slipway.compression import compiled, engine, gate, memory, recipes
from slipway.compression.engine import Run
from slipway.compression.pareto import Variant
from slipway.compression.recipes import Recipe
from slipway.errors import ParamsError
from slipway.params import CompressParams
from slipway.serving import engines

BATCHES = (1, 8)
"""Batch sizes that are timed: a replica runs what waits, mostly one request, a handful at a busy time."""
TIMED = 100  # requests of each batch size that are timed
HELD_OUT = 4096  # validation samples that quality is read from
RANKED = 1024  # of them, those whose ten best answers are compared

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Form:
    """A recipe's model in one engine."""

    recipe: Recipe
    model: bytes
    """As the engine loads it."""
    engine: str
    run: Run
    latency_ms: Mapping[int, float]

    @property
    def pace(self) -> float:
        """Geometric mean of the latencies."""
        return math.prod(self.latency_ms.values()) ** (1 / len(self.latency_ms))


def usable(asked: str, compiles: bool = True) -> list[str]:
    """Engines that are tried: those that are here, or the one that was asked for.

    Args:
        asked: as `compress.engine` says.
        compiles: whether the workload has a module that can be compiled.

    Raises:
        ParamsError: it is not here; says why, what to do, and which are.
    """
    missing = {name: engines.absent(name) for name in engines.KINDS}
    if not missing[engines.COMPILED]:
        missing[engines.COMPILED] = compiled.absent() if compiles else "the workload has no module to compile"
    there = [name for name, reason in missing.items() if not reason]
    if asked == "auto":
        return [name for name in there if name != engines.COMPILED]
    if asked == "all":
        return there
    if missing[asked]:
        raise ParamsError(f"params.yaml: compress.engine: {missing[asked]}; here are: auto, {', '.join(there)}")
    return [asked]


def forms(models: Mapping[Recipe, bytes], names: Sequence[str], export: Any, seed: int) -> list[Form]:
    """Load every model into every engine that can compute it as its recipe says, and time all of them in turn.

    Args:
        models: ONNX by recipe; FP32 among them.
        names: of the engines.
        export: the workload's, for requests and the outputs that an ordinary one fetches.
        seed: of the requests.
    """
    made = {
        (recipe, name): _compiled(export) if name == engines.COMPILED else model
        for recipe, model in models.items()
        for name in names
        if computes(name, recipe)
    }
    runs = {
        f"{recipe.name} in {name}": engine.load(model, recipe.name, 1, name, recipe.precision)
        for (recipe, name), model in made.items()
    }
    medians: dict[str, dict[int, float]] = {label: {} for label in runs}
    for batch in BATCHES:
        taken = engine.latencies_ms(runs, export.served, export.requests(batch, TIMED, seed))
        for label, values in taken.items():
            medians[label][batch] = round(float(np.median(values)), 4)
    return [
        Form(recipe, model, name, run, medians[label])
        for ((recipe, name), model), (label, run) in zip(made.items(), runs.items(), strict=True)
    ]


def _compiled(export: Any) -> bytes:
    # The golden inputs, because no dimension of theirs is 1 and no two are equal.
    return compiled.package(export.module(), export.golden())


def computes(name: str, recipe: Recipe) -> bool:
    """Whether an engine takes a recipe: all take fp32 and int8, bf16 is OpenVINO's; what is compiled is FP32 itself."""
    if name == engines.COMPILED:
        return recipe == recipes.FULL
    return recipe.precision != "bf16" or name in ("openvino", "npu")


def fastest(found: Sequence[Form]) -> list[Form]:
    """The fastest form of each recipe, in the order of the recipes."""
    best: dict[str, Form] = {}
    for form in found:
        known = best.get(form.recipe.name)
        if known is None or form.pace < known.pace:
            best[form.recipe.name] = form
    return list(best.values())


class Judge:
    """Scores forms on the same validation samples and holds each against FP32 in ONNX Runtime, the reference.

    Args:
        scoring: the workload's module.
        data: folder of the ingested data.
        assets: folder with what the workload's package holds beside the model.
        limits: the gate.
        seed: of the samples.
    """

    def __init__(self, scoring: ModuleType, data: Path, assets: Path, limits: CompressParams, seed: int) -> None:
        self.scoring, self.assets, self.limits = scoring, assets, limits
        self.samples = scoring.samples(data, "validation", HELD_OUT, seed)
        self.masks = scoring.slices(self.samples)
        self.few = scoring.samples(data, "validation", RANKED, seed) if hasattr(scoring, "best") else None
        self.reference: Form | None = None
        self.full: gate.Floats | None = None
        self.best: Any = None

    def refer(self, reference: Form) -> None:
        """Score the form that all others are held against."""
        self.reference, self.full, self.best = reference, self._score(reference), self._best(reference)

    def variant(self, form: Form, found: Sequence[Form], inputs: Any) -> Variant:
        """Measure a form.

        Args:
            form: of FP32 or another recipe.
            found: all forms that were timed, for the speed-ups.
            inputs: a batch that its peak memory is read with.
        """
        assert self.full is not None, "refer comes first"
        full = [each for each in found if each.recipe == recipes.FULL]
        same = next(each for each in full if each.engine == form.engine)
        quick = min(full, key=lambda each: each.pace)
        values = self.full if form is self.reference else self._score(form)
        quality = None
        if form.recipe != recipes.FULL:
            quality = gate.judge(self.full, values, self.masks, self.limits, self._overlap(form))
        peak, before = memory.measure(form.model, form.engine, form.recipe.precision, inputs)
        return Variant(
            form.recipe.name,
            form.recipe.precision,
            form.engine,
            float(values.mean()),
            form.latency_ms,
            len(form.model),
            peak,
            peak - before,
            _gains(quick, form),
            _gains(same, form),
            quality,
        )

    def _score(self, form: Form) -> gate.Floats:
        values: gate.Floats = self.scoring.score(form.run, self.samples, self.assets, sampled=False)[
            self.scoring.METRIC
        ]
        return values

    def _best(self, form: Form) -> Any:
        return None if self.few is None else self.scoring.best(form.run, self.few, self.assets)

    def _overlap(self, form: Form) -> float | None:
        mine = self._best(form)
        return None if mine is None else overlap(self.best, mine)


def overlap(full: Any, ours: Any) -> float:
    """Share of the full model's answers [U, K] that are among the other's, in any order."""
    return float(np.mean([np.isin(wanted, got).mean() for wanted, got in zip(full, ours, strict=True)]))


def _gains(slow: Form, quick: Form) -> dict[int, float]:
    return {batch: round(slow.latency_ms[batch] / quick.latency_ms[batch], 3) for batch in slow.latency_ms}


def reference(found: Sequence[Form]) -> Form:
    """FP32 in ONNX Runtime, or in the one engine that was asked for."""
    full = [form for form in found if form.recipe == recipes.FULL]
    return next((form for form in full if form.engine == package.ENGINE), full[0])
