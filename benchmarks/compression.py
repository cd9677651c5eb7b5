"""Compression: what each recipe costs and gains, in one engine, one thread, taken in turn; and the Pareto plot.

    python -m benchmarks.compression [--classifier DIR] [--ranker DIR] [--json FILE] [--plot FILE]

A DIR is a workspace behind `tasks.compress`: its params.yaml named the recipes, models/export holds what came of them.
Every model is timed anew, against FP32 in the same engine and, for the ranker, against torch eager, on histories as
they are and on full ones; quality is that of the held-out samples, validation and test together, for a recipe that
trains on also against `tuned`, FP32 trained on as long. Without a DIR this checkout is taken for its workload.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.claims import Claim, tell
from slipway import config
from slipway.compression import compiled, engine, gate, page, recipes, search
from slipway.compression.compiled import Torch
from slipway.compression.engine import Run
from slipway.params import Params
from slipway.serving import engines
from slipway.workloads.base import Tensors, part

DATA, TRAINED, EXPORT, PACKAGE = (Path(p) for p in ("data/ingest", "models/trained", "models/export", "models/package"))
TIMED = 200
SEED = 1
OVERLAP_OF = 2048


@dataclass(frozen=True)
class Measured:
    """One recipe in one engine."""

    recipe: str
    engine: str
    latency_ms: Mapping[int, float]
    full_ms: Mapping[int, float]
    """With the longest histories, of the ranker."""
    size_bytes: int
    values: gate.Floats
    """[U] metric on the held-out samples."""
    best: Any
    """[U, 10], of a workload that ranks."""


def measure(params: Params) -> tuple[list[Measured], dict[str, dict[int, float]]]:
    """Time and score every export of the workspace in every engine that loads ONNX, and time torch, compiled and not.

    Returns:
        The measurements, and the medians of torch and torch.compile by batch size.
    """
    export, scoring = part(params.workload, "export").EXPORT(DATA, TRAINED), part(params.workload, "scoring")
    names = search.usable("auto")
    made = {
        (path.stem, name): (path.read_bytes(), recipes.FULL if path.stem == "fp32" else recipes.parse(path.stem))
        for path in sorted(EXPORT.glob("*.onnx"))
        for name in names
    }
    made = {key: each for key, each in made.items() if search.computes(key[1], each[1])}
    runs = {
        f"{recipe} {name}": engine.load(model, f"{recipe}.onnx", 1, name, how.precision)
        for (recipe, name), (model, how) in made.items()
    }
    torch = {"torch": engine.of(Torch(export.module()))}
    if not compiled.absent():
        torch["torch.compile"] = engine.load(compiled.package(export.module(), export.golden()), "fp32", 1, "inductor")
    timed = {**runs, **torch}
    medians = _medians(timed, export.served, {batch: export.requests(batch, TIMED, SEED) for batch in search.BATCHES})
    long = {batch: _full(params, export.requests(batch, TIMED, SEED)) for batch in search.BATCHES}
    full = _medians(runs, export.served, long) if params.workload == "ranker" else {label: {} for label in runs}
    found = []
    for (recipe, name), (model, _) in made.items():
        run = runs[f"{recipe} {name}"]
        held = [scoring.samples(DATA, split, 0, SEED) for split in ("validation", "test")]
        scored = [scoring.score(run, samples, PACKAGE, sampled=False)[scoring.METRIC] for samples in held]
        few = scoring.samples(DATA, "test", OVERLAP_OF, SEED)
        best = scoring.best(run, few, PACKAGE) if hasattr(scoring, "best") else None
        label = f"{recipe} {name}"
        found.append(Measured(recipe, name, medians[label], full[label], len(model), np.concatenate(scored), best))
    return found, {name: medians[name] for name in torch}


def _medians(
    runs: Mapping[str, Run], outputs: Sequence[str], requests: Mapping[int, Sequence[Tensors]]
) -> dict[str, dict[int, float]]:
    """Median latency of each run by batch size: ms."""
    found: dict[str, dict[int, float]] = {label: {} for label in runs}
    for batch, inputs in requests.items():
        for label, values in engine.latencies_ms(runs, outputs, inputs).items():
            found[label][batch] = float(np.median(values))
    return found


def _full(params: Params, requests: Sequence[Tensors]) -> list[Tensors]:
    """The ranker's requests with histories of full length: what each holds, over and over."""
    if params.workload != "ranker":
        return []
    longest: int = params.model.model_dump()["max_length"]
    return [
        {name: np.maximum(np.tile(rows, (1, longest))[:, -longest:], 1)}
        for each in requests
        for name, rows in each.items()
    ]


def _same(found: Sequence[Measured], recipe: str) -> tuple[Measured, Measured] | None:
    """A recipe in its fastest engine, and FP32 in that one."""
    mine = [each for each in found if each.recipe == recipe]
    if not mine:
        return None
    quick = min(mine, key=lambda each: math.prod(each.latency_ms.values()))
    return quick, next(each for each in found if each.recipe == "fp32" and each.engine == quick.engine)


def _title(each: Measured) -> str:
    return f"{each.recipe} in {engines.TITLES.get(each.engine, each.engine)}"


def classifier(found: Sequence[Measured]) -> list[Claim]:
    """Hold what was measured of the classifier against what is to be reached."""
    claims = []
    smaller = (0.25, 2.8, "; aim: 6 x, 12 %")
    wanted = {"qat": (0.25, 3.0, ""), "prune-50-qat": smaller, "distill-50-qat": smaller, "prune-50-int8": smaller}
    for recipe, (size, speed, aim) in wanted.items():
        pair = _same(found, recipe)
        if pair is None:
            continue
        ours, full = pair
        share, gain = ours.size_bytes / full.size_bytes, full.latency_ms[1] / ours.latency_ms[1]
        lost = float(full.values.mean() - ours.values.mean())
        half = 1.96 * float((full.values - ours.values).std()) / len(full.values) ** 0.5
        claims.append(
            Claim(f"classifier, {_title(ours)}: size", f"{size:.0%}{aim}", _mb(full), f"{_mb(ours)}: {share:.1%}",
                  1 / share, share <= size)
        )  # fmt: skip
        claims.append(
            Claim(f"classifier, {_title(ours)}: latency at batch 1", f"{speed:g} x{aim}",
                  f"{full.latency_ms[1]:.3f} ms", f"{ours.latency_ms[1]:.3f} ms", gain, gain >= speed)
        )  # fmt: skip
        claims.append(
            Claim(f"classifier, {recipe}: top-1 of {len(full.values):,} pictures", "0.8 points less at most",
                  f"{full.values.mean():.4f}", f"{ours.values.mean():.4f} ({-lost:+.4f}, 95 % ± {half:.4f})",
                  float(ours.values.mean() / full.values.mean()), lost <= 0.008)
        )  # fmt: skip
    tuned = next((each for each in found if each.recipe == "tuned"), None)
    for recipe in wanted if tuned else ():
        if tuned and (pair := _same(found, recipe)):
            kept, gap = pair[0].values, pair[0].values - tuned.values
            half = 1.96 * float(gap.std()) / len(gap) ** 0.5
            claims.append(
                Claim(f"classifier, {recipe}: top-1 against FP32 trained on as long", "0.8 points less at most",
                      f"{tuned.values.mean():.4f}", f"{kept.mean():.4f} ({gap.mean():+.4f}, 95 % ± {half:.4f})",
                      float(kept.mean() / tuned.values.mean()), float(gap.mean()) >= -0.008)
            )  # fmt: skip
    trained, plain = _same(found, "qat"), _same(found, "int8")
    if trained and plain:
        better = float(trained[0].values.mean() - plain[0].values.mean())
        claims.append(
            Claim("classifier: QAT against calibrated INT8, top-1", "no less", f"{plain[0].values.mean():.4f}",
                  f"{trained[0].values.mean():.4f}",
                  float(trained[0].values.mean() / plain[0].values.mean()), better >= 0)
        )  # fmt: skip
    return claims


def ranker(found: Sequence[Measured], eager: Mapping[int, float]) -> list[Claim]:
    """Hold what was measured of the ranker against what is to be reached."""
    pair = _same(found, "int8")
    if pair is None:
        return []
    ours, full = pair
    claims = []
    for kind, quick, slow in (("", ours.latency_ms, full.latency_ms), (", full histories", ours.full_ms, full.full_ms)):
        claims += [
            Claim(f"ranker, {_title(ours)}: latency at batch {batch}{kind}", "2 x its engine's FP32",
                  f"{slow[batch]:.3f} ms", f"{ms:.3f} ms", slow[batch] / ms, slow[batch] / ms >= 2)
            for batch, ms in quick.items()
        ]  # fmt: skip
    claims += [
        Claim(f"ranker, {_title(ours)}: latency at batch {batch} against torch eager", "3 x",
              f"{eager[batch]:.3f} ms", f"{ms:.3f} ms", eager[batch] / ms, eager[batch] / ms >= 3)
        for batch, ms in ours.latency_ms.items()
    ]  # fmt: skip
    shared, share = search.overlap(full.best, ours.best), ours.size_bytes / full.size_bytes
    lost = gate.drop(full.values, ours.values, 1.0, 0.95)
    claims.append(Claim("ranker, int8: overlap@10 with FP32", "0.98", "1", f"{shared:.4f}", shared, shared >= 0.98))
    claims.append(Claim("ranker, int8: size", "25 %", _mb(full), f"{_mb(ours)}: {share:.1%}", 1 / share, share <= 0.25))
    claims.append(
        Claim(f"ranker, int8: NDCG@10 of {len(full.values):,} samples", "2 % less at most", f"{full.values.mean():.4f}",
              f"{ours.values.mean():.4f} (loses {lost.value:+.2%}, at most {lost.high or 1:.2%})",
              float(ours.values.mean() / full.values.mean()), lost.high is not None and lost.high <= 0.02)
    )  # fmt: skip
    return claims


def _mb(each: Measured) -> str:
    return f"{each.size_bytes / 1e6:.2f} MB"


def plot(found: Sequence[Measured], metric: str, path: Path) -> None:
    """Draw metric against latency, each recipe in its fastest engine."""
    names = list(dict.fromkeys(each.recipe for each in found))
    quick = [pair[0] for name in names if (pair := _same(found, name))]
    shown = {
        each.recipe: {
            "engine": each.engine,
            "metric": float(each.values.mean()),
            "latency_ms": each.latency_ms,
            "size_bytes": each.size_bytes,
        }
        for each in quick
    }
    figure = page.pareto({"variants": shown, "metric": metric, "front": [], "choice": {"recipe": ""}})
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})


def main() -> int:
    """Measure what was asked for and tell it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", type=Path, help="a workspace of the classifier, behind tasks.compress")
    parser.add_argument("--ranker", type=Path, help="a workspace of the ranker, behind tasks.compress")
    parser.add_argument("--json", type=Path, help="where the claims go as JSON")
    parser.add_argument("--plot", type=Path, help="where the Pareto plot of the first workspace goes, as PNG")
    options = parser.parse_args()
    given = {name: place for name in ("classifier", "ranker") if (place := getattr(options, name))}
    places = given or {config.load().workload: Path()}
    drawn, claims = options.plot.absolute() if options.plot else None, []
    for name, place in places.items():
        with chdir(place):
            params = config.load()
            if params.workload != name or not (EXPORT / "fp32.onnx").exists():
                parser.error(f"{place}: no workspace of {name} behind tasks.compress")
            found, torch = measure(params)
            claims += classifier(found) if name == "classifier" else ranker(found, torch["torch"])
            if drawn:
                plot(found, part(name, "scoring").METRIC, drawn)
                drawn = None
        for each in found:
            ms = ", ".join(f"{value:.3f} ms at batch {batch}" for batch, value in each.latency_ms.items())
            print(f"{name}: {_title(each)}: {each.values.mean():.4f}, {ms}, {_mb(each)}")
        for kind, latency in torch.items():
            print(f"{name}: FP32 in {kind}: " + ", ".join(f"{ms:.3f} ms at batch {b}" for b, ms in latency.items()))
    command = "python -m benchmarks.compression " + " ".join(f"--{name} DIR" for name in places)
    tell("Compression", command.strip(), claims, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
