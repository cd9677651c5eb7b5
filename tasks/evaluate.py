"""Score the exports on test data, by slice and against the champion, and hold the candidate against its gates.

Reads data/ingest, models/export, models/package and the curve of reports/train.json; writes reports/evaluate.json and
reports/evaluate.html. A missed gate does not fail this stage: `register` refuses the candidate.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from slipway import artifacts, package, stage, tracking
from slipway.compression import engine
from slipway.config import Params
from slipway.evaluation import page, scores
from slipway.progress import Progress
from slipway.stage import Report
from slipway.workloads.base import Tensors, part

DATA, EXPORT, PACKAGE = Path("data/ingest"), Path("models/export"), Path("models/package")
CURVE, PAGE = Path("reports/train.json"), Path("reports/evaluate.html")
SEED = 0
TIMED = 1000


def run(params: Params, report: Report) -> None:
    """Score, compare, judge, show."""
    scoring, sealed = part(params.workload, "scoring"), package.load(PACKAGE)
    models = {path.stem: path.read_bytes() for path in sorted(EXPORT.glob("*.onnx"))}
    runs = {precision: engine.load(model, f"{EXPORT}/{precision}.onnx") for precision, model in models.items()}
    samples = scoring.samples(DATA, "test", params.evaluate.max_users, SEED)
    values: dict[str, Mapping[str, scores.Floats]] = {}
    with Progress("evaluate", len(runs) + 2, "steps") as progress:
        for precision, model in runs.items():
            values[precision] = scoring.score(model, samples, PACKAGE)
            progress.advance(step=precision)
        served = values[sealed.precision]
        champion = _champion(params.workload, scoring, samples, served[scoring.METRIC])
        progress.advance(step="champion")
        requests = [_row(sealed.golden()[0], at) for at in range(TIMED)]
        latencies = engine.latencies_ms(runs, [sealed.outputs[0].name], requests)
        progress.advance(step="latency")
    speed = {name: {"p50": _quantile(taken, 0.5), "p99": _quantile(taken, 0.99)} for name, taken in latencies.items()}
    metric = float(served[scoring.METRIC].mean())
    judged = scores.gates(params.evaluate, metric, champion, speed[sealed.precision]["p99"])
    found = {
        "workload": params.workload,
        "served": sealed.precision,
        "samples": len(samples),
        "metric": scoring.METRIC,
        "metrics": {precision: _metrics(scoring, value) for precision, value in values.items()},
        "slices": _slices(scoring.slices(samples), served[scoring.METRIC]),
        "champion": asdict(champion) if champion else None,
        "latency_ms": speed,
        "size_bytes": {precision: len(model) for precision, model in models.items()},
        "gates": [asdict(gate) for gate in judged],
        "passed": all(gate.passed for gate in judged),
    }
    for key, value in found.items():
        report[key] = value
    trained = artifacts.read_json(CURVE) if CURVE.exists() else {}
    page.write(PAGE, found, latencies, trained, scoring.examples(runs[sealed.precision], samples, PACKAGE))
    _tell(judged)


def _metrics(scoring: ModuleType, values: Mapping[str, scores.Floats]) -> dict[str, float]:
    """Means over the samples, and what they also tell people, such as perplexity."""
    means = scores.means(values)
    return {**means, **{name: round(value, 6) for name, value in scoring.figures(means).items()}}


def _champion(workload: str, scoring: ModuleType, samples: Any, candidate: scores.Floats) -> scores.Champion | None:
    version = tracking.alias(workload, "champion")
    if version is None:
        return None
    folder = tracking.fetch(workload, version) / "package"
    model = engine.load((folder / package.MODEL).read_bytes(), f"{workload}/{version}")
    values = scoring.score(model, samples, folder, sampled=False)
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


if __name__ == "__main__":
    stage.main(run)
