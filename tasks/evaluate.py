"""Score the exports on test data, by slice and against the champion, and hold the candidate against its gates.

Reads data/ingest, models/export, models/package and the curve of reports/train.json; writes reports/evaluate.json and
reports/evaluate.html. A missed gate does not fail this stage: `register` refuses the candidate.

    python -m tasks.evaluate --model VERSION|ALIAS|FOLDER [--source PATH] [--json FILE]

scores any model on any data of the workload's form instead, in full precision and compressed side by side, and leaves
this workspace as it is. A source is read as params.yaml says (`ingest.columns` …), all of it as held-out data.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console

from slipway import artifacts, config, package, stage, tracking
from slipway.compression import engine
from slipway.evaluation import comparison, page, scores, subject
from slipway.evaluation.subject import FP32, Subject
from slipway.package import Package
from slipway.params import IngestParams, Params
from slipway.progress import Progress
from slipway.serving import engines
from slipway.stage import Report, Show
from slipway.workloads.base import Tensors, part

DATA, EXPORT, PACKAGE = Path("data/ingest"), Path("models/export"), Path("models/package")
CURVE, PAGE = Path("reports/train.json"), Path("reports/evaluate.html")
SEED = 0
TIMED = 1000


def run(params: Params, report: Report) -> None:
    """Score, compare, judge, show."""
    scoring, sealed = part(params.workload, "scoring"), package.load(PACKAGE)
    models = {FP32: EXPORT / f"{FP32}.onnx", sealed.recipe: PACKAGE / package.MODEL}
    runs = {recipe: _loaded(path, sealed) for recipe, path in models.items()}
    samples = scoring.samples(DATA, "test", params.evaluate.max_users, SEED)
    values: dict[str, Mapping[str, scores.Floats]] = {}
    with Progress("evaluate", len(runs) + 2, "steps") as progress:
        for recipe, model in runs.items():
            values[recipe] = scoring.score(model, samples, PACKAGE)
            progress.advance(step=recipe)
        served = values[sealed.recipe]
        champion = _champion(params.workload, scoring, samples, served[scoring.METRIC])
        progress.advance(step="champion")
        requests = [_row(sealed.golden()[0], at) for at in range(TIMED)]
        latencies = engine.latencies_ms(runs, [sealed.outputs[0].name], requests)
        progress.advance(step="latency")
    speed = {name: {"p50": _quantile(taken, 0.5), "p99": _quantile(taken, 0.99)} for name, taken in latencies.items()}
    metric = float(served[scoring.METRIC].mean())
    judged = scores.gates(params.evaluate, metric, champion, speed[sealed.recipe]["p99"])
    found = {
        "workload": params.workload,
        "served": sealed.recipe,
        "samples": len(samples),
        "metric": scoring.METRIC,
        "metrics": {recipe: _metrics(scoring, value) for recipe, value in values.items()},
        "slices": _slices(scoring.slices(samples), served[scoring.METRIC]),
        "champion": asdict(champion) if champion else None,
        "latency_ms": speed,
        "size_bytes": {recipe: path.stat().st_size for recipe, path in models.items()},
        "gates": [asdict(gate) for gate in judged],
        "passed": all(gate.passed for gate in judged),
    }
    for key, value in found.items():
        report[key] = value
    trained = artifacts.read_json(CURVE) if CURVE.exists() else {}
    run, more = runs[sealed.recipe], getattr(scoring, "chapters", None)
    page.write(
        *(PAGE, found, latencies, trained, scoring.examples(run, samples, PACKAGE)),
        more=more(run, samples, PACKAGE, served) if more is not None else (),
    )
    _tell(judged)


def _loaded(path: Path, sealed: Package) -> engine.Run:
    """A model as a function: that of the package in the engine that serves it, any other in ONNX Runtime."""
    if path == sealed.folder / package.MODEL:
        return engine.of(engines.of(sealed, 1, sealed.engine))  # code, too: compress made it here
    return engine.load(path.read_bytes(), str(path))


def _metrics(scoring: ModuleType, values: Mapping[str, scores.Floats]) -> dict[str, float]:
    """Means over the samples, and what they also tell people, such as perplexity."""
    means = scores.means(values)
    return {**means, **{name: round(value, 6) for name, value in scoring.figures(means).items()}}


def _champion(workload: str, scoring: ModuleType, samples: Any, candidate: scores.Floats) -> scores.Champion | None:
    version = tracking.alias(workload, "champion")
    if version is None:
        return None
    folder = tracking.fetch(workload, version) / "package"
    model = engines.of(package.load(folder), 1)
    values = scoring.score(engine.of(model), samples, folder, sampled=False)
    return scores.against(version, candidate, values[scoring.METRIC])


def _row(inputs: Tensors, at: int) -> Tensors:
    """One sample of a batch, in turn, as a batch of its own."""
    return {name: value[at % len(value)][None] for name, value in inputs.items()}


def _quantile(taken: scores.Floats, share: float) -> float:
    return round(float(np.quantile(taken, share)), 4)


def _slices(masks: Mapping[str, Any], values: scores.Floats) -> list[dict[str, Any]]:
    rows = []
    for name, mask in masks.items():
        if mask.any():
            low, high = scores.interval(values[mask])
            mean = float(values[mask].mean())
            rows.append({"name": name, "count": int(mask.sum()), "value": mean, "low": low, "high": high})
    return rows


def _tell(judged: list[scores.Gate]) -> None:
    for gate in judged:
        if not gate.passed:
            print(
                f"evaluate: gate evaluate.{gate.name} failed: {gate.value:.4g} against {gate.limit:g}; "
                "this candidate will not be registered (see reports/evaluate.html)",
                file=sys.stderr,
            )


def show(params: Params, asked: Mapping[str, str]) -> None:
    """Score the model that was asked for and print what it scored.

    Raises:
        SlipwayError: there is no such model, or the source cannot be read.
    """
    model = subject.find(params.workload, asked["model"])
    with tempfile.TemporaryDirectory(prefix="slipway-") as scratch:
        data, read = DATA, {}
        if "source" in asked:
            data = Path(scratch) / "data"
            read = _held_out(params, model, asked["source"], data)
        found = _scored(params, model, data)
    found = {"model": model.name, "source": asked.get("source", str(DATA)), **found}
    found["left_out"] = read.get("dropped") or {}
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(*comparison.tables(found), *comparison.notes(found), sep="\n")
    if "json" in asked:
        artifacts.write_json(Path(asked["json"]), found)


def _held_out(params: Params, model: Subject, source: str, out: Path) -> dict[str, Any]:
    """Ingest a source as the workload of the model does, all of it as test data; what the reading found."""
    read: dict[str, Any] = {}
    ingest = config.check(IngestParams, params.ingest.model_dump() | {"source": source}, Path("--source"))
    given = params.model_copy(update={"workload": model.package.workload, "ingest": ingest})
    part(model.package.workload, "ingest").held_out(given, model.package.folder, out, read)
    return read


def _scored(params: Params, model: Subject, data: Path) -> dict[str, Any]:
    scoring = part(model.package.workload, "scoring")
    samples = scoring.samples(data, "test", params.evaluate.max_users, SEED)
    values = {}
    with Progress("evaluate", len(model.models), "models") as progress:
        for recipe, path in model.models.items():
            values[recipe] = scoring.score(_loaded(path, model.package), samples, model.package.folder)
            progress.advance(step=recipe)
    return {
        "workload": model.package.workload,
        "samples": len(samples),
        "metric": scoring.METRIC,
        **comparison.compare(values, scoring.METRIC, scoring.slices(samples)),
        "unknown": [asdict(each) for each in scoring.unknown(samples, model.package.folder)],
    }


ANY = Show(
    "model",
    "score this model instead: a version's number, an alias such as champion, or the folder of a package",
    "MODEL",
    {
        "source": "data of the workload's form to score it on (default: the test data of this workspace)",
        "json": "file that the figures are written into too",
    },
    show,
)

if __name__ == "__main__":
    stage.main(run, shows=ANY)
