"""Export a model for devices: an edge package that runs without the training stack, its answers checked.

    python -m tasks.export [--model VERSION|ALIAS|FOLDER] [--out FOLDER]

Reads the package of the model, by default that of this workspace (models/package); writes the edge package, by default
models/edge (whole or absent; slipway/compression/edge.py says what is in it), and reports/export.json: size, start
time, latency and peak memory in a process of its own, beside those of the full model where there is one.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from slipway import artifacts, stage
from slipway.compression import edge
from slipway.errors import ParamsError
from slipway.evaluation import subject
from slipway.params import Params
from slipway.progress import Progress
from slipway.stage import Report

PACKAGE, OUT = "models/package", "models/edge"


def run(params: Params, report: Report) -> None:
    """Convert, run apart, compare, tell."""
    conf = stage.conf()
    reference, out = conf.get("model", PACKAGE), conf.get("out", OUT)
    if not isinstance(reference, str) or not isinstance(out, str):
        raise ParamsError(f"conf: model and out must be texts, got {conf}")
    model = subject.find(params.workload, reference)
    figures: dict[str, edge.Figures] = {}
    with Progress("export", len(model.models), "models") as progress:
        for recipe, path in model.models.items():
            served = recipe == model.package.recipe
            with (
                tempfile.TemporaryDirectory(prefix="slipway-") as scratch,
                artifacts.writing(Path(out) if served else Path(scratch) / "full") as folder,
            ):
                edge.write(model.package, path, folder)
                figures[recipe] = edge.measure(folder, model.package if served else None)
            progress.advance(step=recipe)
    report["model"], report["recipe"], report["out"] = model.name, model.package.recipe, out
    report["figures"] = {recipe: asdict(each) for recipe, each in figures.items()}
    Console(width=None if sys.stdout.isatty() else 120).print(_table(figures, model.name))
    print(f"written: {out}; on the device: pip install onnxruntime numpy, then python run.py")


def _table(figures: dict[str, edge.Figures], name: str) -> Table:
    table = Table("", "size", "start", "load", "P50", "peak memory", "of it the model", title=f"{name} on a device")
    for recipe, each in figures.items():
        table.add_row(
            recipe.upper(),
            f"{each.size_bytes / 1e6:.2f} MB",
            f"{each.start_ms:.0f} ms",
            f"{each.load_ms:.1f} ms",
            f"{each.p50_ms:.2f} ms",
            f"{each.peak_mb:.0f} MB",
            f"{each.model_mb:.1f} MB",
        )
    return table


if __name__ == "__main__":
    stage.main(
        run,
        takes={
            "model": f"a version's number, an alias, or the folder of a package (default: {PACKAGE})",
            "out": f"folder that is written (default: {OUT})",
        },
    )
