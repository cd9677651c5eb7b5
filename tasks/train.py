"""Train the model on several processes with DeepSpeed; killed and run again, it goes on and ends the same.

Reads data/ingest and data/accepted.json; writes models/trained (weights.npz, model.json), the page reports/train.html
and reports/train.json: `curve` has loss, validation metric and speed of every epoch, `history` has speed, utilisation,
gradient, memory, traffic and shares of the time, every few steps (slipway/training/meter.py says which). While it runs,
a MLflow server that answers gets them too. With `train.profile` there is reports/train.trace.json.gz, for Perfetto.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slipway import artifacts, config, record, stage
from slipway.config import Params
from slipway.stage import Report
from slipway.training import loop, page

DATA, OUT = Path("data/ingest"), Path("models/trained")
PAGE, TRACE = Path("reports/train.html"), Path("reports/train.trace.json.gz")


def run(params: Params, report: Report) -> None:
    """Train, keep the best epoch's weights, and forget the checkpoints."""
    key = loop.key(params.workload, DATA, params.train, params.model)
    name = os.environ.get(record.RUN_VARIABLE) or f"train-{key}"
    checkpoints = config.home() / "checkpoints" / key
    TRACE.unlink(missing_ok=True)
    with artifacts.writing(OUT) as beside:
        state = loop.train(
            loop.Job(
                params.workload,
                DATA,
                params.train,
                params.model,
                checkpoints,
                beside,
                run=name,
                trace=TRACE.absolute() if params.train.profile else None,
            )
        )
    found: dict[str, Any] = {"workload": params.workload, "run": name, "best": asdict(state.best)}
    found["train_seconds"], found["samples_per_s"] = round(state.seconds, 1), round(state.samples / state.seconds, 1)
    found["curve"], found["loss_scale"] = [[asdict(each) for each in some] for some in (state.curve, state.loss_scale)]
    found |= state.figures
    for name, value in found.items():
        report[name] = value
    if TRACE.exists():
        report["trace"] = TRACE
    page.write(PAGE, found, params.train.epochs)
    loop.forget(checkpoints)


if __name__ == "__main__":
    stage.main(run)
