"""What a model scores on one set of samples, in each of its forms side by side: as values, and as tables to read."""

# U samples
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy.typing as npt
from rich.table import Table

from slipway.evaluation import scores
from slipway.evaluation.scores import Floats

Masks = Mapping[str, npt.NDArray[Any]]


def compare(values: Mapping[str, Mapping[str, Floats]], metric: str, masks: Masks) -> dict[str, Any]:
    """Sum up the scores of a model's forms on the same samples.

    Args:
        values: [U] by precision and name of the score; the first precision is what the others are held against.
        metric: the score that is looked at by slice.
        masks: [U] by slice.

    Returns:
        metrics (by precision and name), slices, and differences of the metric to the first precision, each value with
        the 95 % interval `low` to `high`; differences are paired by sample.
    """
    first, *others = values
    return {
        "metrics": {
            precision: {name: _value(each) for name, each in found.items()} for precision, found in values.items()
        },
        "differences": {
            other: _bounded(*scores.difference(values[other][metric], values[first][metric])) for other in others
        },
        "slices": [
            {
                "name": name,
                "count": int(mask.sum()),
                **{precision: _value(found[metric][mask]) for precision, found in values.items()},
            }
            for name, mask in masks.items()
            if mask.any()
        ],
    }


def _value(values: Floats) -> dict[str, float]:
    return _bounded(float(values.mean()), *scores.interval(values))


def _bounded(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": round(value, 6), "low": round(low, 6), "high": round(high, 6)}


def tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """Make the tables that people read of what `compare` found."""
    precisions = list(found["metrics"])
    columns = [f"{precision.upper()} (95 %)" for precision in precisions]
    overall = Table("metric", *columns, title=f"{found['model']} on {found['source']}, {found['samples']:,} samples")
    for name in found["metrics"][precisions[0]]:
        overall.add_row(name, *(_shown(found["metrics"][precision][name]) for precision in precisions))
    yield overall
    if found["slices"]:
        parts = Table("slice", "samples", *columns, title=f"{found['metric']} by slice")
        for row in found["slices"]:
            parts.add_row(row["name"], f"{row['count']:,}", *(_shown(row[precision]) for precision in precisions))
        yield parts


def notes(found: Mapping[str, Any]) -> Iterator[str]:
    """Say in sentences what the tables do not: differences, what was left out, what the model does not know."""
    first = next(iter(found["metrics"]))
    for precision, each in found["differences"].items():
        verdict = "better" if each["low"] > 0 else "worse" if each["high"] < 0 else "not told apart"
        yield (
            f"{precision.upper()} against {first.upper()}, {found['metric']} on the same samples: {each['value']:+.4f} "
            f"(95 %: {each['low']:+.4f} to {each['high']:+.4f}): {verdict}"
        )
    left = {reason: count for reason, count in found["left_out"].items() if count}
    if left:
        yield "left out: " + ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in left.items())
    for each in found["unknown"]:
        yield (
            f"unknown to the model: {each['count']:,} of {each['of']:,} {each['what']}, such as "
            f"{', '.join(each['examples'])}; what needs them counts as missed"
        )


def _shown(value: Mapping[str, float]) -> str:
    return f"{value['value']:.4f} ({value['low']:.4f} to {value['high']:.4f})"
