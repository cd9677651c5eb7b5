"""The page of `evaluate`: what the candidate scored, where, how fast, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipway.reporting import Chapter, Note, Plot, Table, Tile, Verdict, canvas, metric_title, write_html


def write(
    path: Path,
    found: Mapping[str, Any],
    latencies: Mapping[str, npt.NDArray[np.float64]],
    trained: Mapping[str, Any],
    examples: tuple[Sequence[str], Sequence[Sequence[object]]],
    more: Sequence[Chapter] = (),
) -> None:
    """Write the page.

    Args:
        path: where to.
        found: the values of reports/evaluate.json.
        latencies: of single predictions in ms, by precision.
        trained: reports/train.json, for its learning curve; empty if there is none.
        examples: header and rows of a table of answers.
        more: chapters that the workload adds.
    """
    served, metric = found["served"], found["metric"]
    verdict: Verdict = "passed" if found["passed"] else "failed"
    tiles = [
        Tile("gates", verdict, verdict),
        Tile(metric_title(metric), f"{found['metrics'][served][metric]:.4f}"),
        Tile("P99 of a prediction", f"{found['latency_ms'][served]['p99']:.2f} ms"),
        Tile("size", f"{found['size_bytes'][served] / 1e6:.1f} MB"),
    ]
    subtitle = f"{found['workload']} in {served.upper()}, {found['samples']:,} test samples"
    chapters = [
        Chapter("Gates", [_gates(found), _champion(found)]),
        Chapter("Quality", [_metrics(found), _slices(found), *_bars(found)]),
        Chapter("Training", _training(trained, metric)),
        Chapter("Latency", [_speed(found), _histogram(latencies)]),
        Chapter("What it answers", [Table("random test samples; a tick marks the true one", *examples)]),
        *more,
    ]
    write_html(path, "Evaluation", subtitle, tiles, chapters)


def _gates(found: Mapping[str, Any]) -> Table:
    rows = [
        (f"evaluate.{gate['name']}", gate["value"], gate["limit"], "passed" if gate["passed"] else "failed")
        for gate in found["gates"]
    ]
    return Table("limits of params.yaml", ("gate", "measured", "limit", "verdict"), rows)


def _champion(found: Mapping[str, Any]) -> Note:
    champion = found["champion"]
    if champion is None:
        return Note("There is no champion yet: this is the first release, so nothing was compared.")
    low, high = champion["low"], champion["high"]
    verdict = "better" if low > 0 else "worse" if high < 0 else "not told apart from it"
    return Note(
        f"Against champion {champion['version']} on the same samples: {champion['metric']:.4f}, difference "
        f"{champion['difference']:+.4f} (95 %: {low:+.4f} to {high:+.4f}): {verdict}.",
        "warning" if high < 0 else "info",
    )


def _metrics(found: Mapping[str, Any]) -> Table:
    names = list(next(iter(found["metrics"].values())))
    rows = [(metric_title(name), *(values[name] for values in found["metrics"].values())) for name in names]
    return Table("test metrics", ("metric", *(precision.upper() for precision in found["metrics"])), rows)


def _slices(found: Mapping[str, Any]) -> Table:
    rows = [(s["name"], s["count"], s["value"], f"{s['low']:.4f} to {s['high']:.4f}") for s in found["slices"]]
    return Table(f"{metric_title(found['metric'])} by slice", ("slice", "samples", "value", "95 % interval"), rows)


def _bars(found: Mapping[str, Any]) -> list[Plot]:
    slices = found["slices"]
    if not slices:
        return []
    figure, axes = canvas(metric_title(found["metric"]), "", height=0.4 + 0.35 * len(slices))
    values = [s["value"] for s in slices]
    error = [[s["value"] - s["low"] for s in slices], [s["high"] - s["value"] for s in slices]]
    axes.barh([s["name"] for s in slices], values, xerr=error, height=0.6, ecolor="#808080")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(left=0)
    return [Plot("by slice, with 95 % intervals", figure)]


def _training(trained: Mapping[str, Any], metric: str) -> list[Plot | Note]:
    curve = trained.get("curve")
    return [_curve(curve, trained.get("metric", metric))] if curve else [Note("no learning curve was kept")]


def _curve(curve: Sequence[Mapping[str, Any]], metric: str) -> Plot:
    from matplotlib.ticker import MaxNLocator

    figure, axes = canvas("epoch", "loss")
    epochs = [point["epoch"] for point in curve]
    mark = "o" if len(curve) < 30 else ""
    (loss,) = axes.plot(epochs, [point["loss"] for point in curve], marker=mark, markersize=3)
    right = axes.twinx()
    right.spines[["top", "right", "left", "bottom"]].set_visible(False)
    right.set_ylabel(f"{metric_title(metric)}, validation")
    (value,) = right.plot(epochs, [point["metric"] for point in curve], color="#e07b39", marker=mark, markersize=3)
    axes.legend(
        [loss, value],
        ["loss (left)", f"{metric_title(metric)} (right)"],
        frameon=False,
        ncols=2,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return Plot("learning curve; the weights of the epoch with the best validation metric are kept", figure)


def _speed(found: Mapping[str, Any]) -> Table:
    rows = [
        (precision.upper(), times["p50"], times["p99"], round(found["size_bytes"][precision] / 1e6, 2))
        for precision, times in found["latency_ms"].items()
    ]
    return Table("one prediction in the engine, one thread", ("precision", "P50 (ms)", "P99 (ms)", "size (MB)"), rows)


def _histogram(latencies: Mapping[str, npt.NDArray[np.float64]]) -> Plot:
    figure, axes = canvas("ms", "predictions")
    # A busy machine's few stalls must not squeeze the shape into one bar.
    longest = max(min(float(np.quantile(v, 0.99)), 4 * float(np.median(v))) for v in latencies.values()) * 1.1
    edges = np.linspace(0, longest, 60).tolist()
    for precision, values in latencies.items():
        axes.hist(np.minimum(values, longest), bins=edges, alpha=0.65, label=precision.upper())
    axes.legend(frameon=False)
    return Plot("latency of single predictions; the last bar holds all that took longer", figure)
