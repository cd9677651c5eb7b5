"""Export the trained model to ONNX, try INT8, and seal the one that passes the gate as a package.

Reads data/ingest and models/trained; writes models/export (fp32.onnx and, if tried, int8.onnx), models/package and
reports/compress.json: sizes, latencies (one thread, medians, taken in turn), the metric of both, and the decision.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from slipway import artifacts, package, stage
from slipway.compression import engine, gate
from slipway.config import Params
from slipway.progress import Progress
from slipway.stage import Report
from slipway.workloads.base import part

DATA, TRAINED, EXPORT, PACKAGE = (
    Path("data/ingest"),
    Path("models/trained"),
    Path("models/export"),
    Path("models/package"),
)
BATCHES = (1, 8)
TIMED = 200  # requests of each batch size that are timed
SEED = 0  # of all samples that are drawn here
HELD_OUT = 4096  # validation samples that the metric is read from


def run(params: Params, report: Report) -> None:
    """Export, quantize, compare, decide, seal."""
    export = part(params.workload, "export").EXPORT(DATA, TRAINED)
    with Progress("compress", 4, "steps") as progress:
        models = {"fp32": export.fp32()}
        if params.compress.int8:
            probe, layers = export.probe()
            samples = list(export.calibration(params.compress.calibration_samples, SEED))
            models["int8"] = export.int8(engine.ranges(engine.load(probe, "probe"), layers, samples))
        with artifacts.writing(EXPORT) as beside:
            beside.mkdir()
            for precision, model in models.items():
                (beside / f"{precision}.onnx").write_bytes(model)
        progress.advance(step="exported")
        runs = {precision: engine.load(model, f"{precision}.onnx") for precision, model in models.items()}
        latency = _latency(export, runs)
        progress.advance(step="timed")
        with artifacts.writing(PACKAGE) as beside:
            beside.mkdir()
            export.files(beside)
            metric = _metric(params, runs, beside)
            progress.advance(step="scored")
            chosen = _choose(params, metric, latency)
            golden = export.golden()
            names = [spec.name for spec in export.outputs]
            answer = dict(zip(names, runs[chosen.precision](names, golden), strict=True))
            (beside / package.MODEL).write_bytes(models[chosen.precision])
            package.seal(
                beside, params.workload, chosen.precision, export.inputs, export.outputs, (dict(golden), answer)
            )
        progress.advance(step="sealed")
    report["size_bytes"] = {precision: len(model) for precision, model in models.items()}
    report["latency_ms"] = latency
    report["metric"] = {"name": part(params.workload, "scoring").METRIC, **metric}
    report["decision"] = asdict(chosen)
    if chosen.precision == "fp32":
        print(f"compress: FP32 is served: {chosen.reason}", file=sys.stderr)


def _latency(export: Any, runs: Mapping[str, engine.Run]) -> dict[str, dict[int, float]]:
    """Median latency in ms by precision and batch size."""
    found: dict[str, dict[int, float]] = {precision: {} for precision in runs}
    for batch in BATCHES:
        requests = export.requests(batch, TIMED, SEED)
        for precision, taken in engine.latencies_ms(runs, export.served, requests).items():
            found[precision][batch] = round(float(np.median(taken)), 4)
    return found


def _metric(params: Params, runs: Mapping[str, engine.Run], assets: Path) -> dict[str, float]:
    """The workload's metric on validation data by precision."""
    scoring = part(params.workload, "scoring")
    samples = scoring.samples(DATA, "validation", HELD_OUT, SEED)
    return {
        precision: float(scoring.score(run, samples, assets, sampled=False)[scoring.METRIC].mean())
        for precision, run in runs.items()
    }


def _choose(params: Params, metric: dict[str, float], latency: dict[str, dict[int, float]]) -> gate.Decision:
    if "int8" not in metric:
        return gate.Decision("fp32", "compress.int8 is off", drop=0.0, speedup=1.0)
    return gate.decide(metric, latency, params.compress)


if __name__ == "__main__":
    stage.main(run)
