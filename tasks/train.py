"""Train the model on several processes with DeepSpeed; killed and run again, it goes on and ends the same.

Reads data/ingest and data/accepted.json; writes models/trained (weights.npz, model.json) and reports/train.json, whose
`curve` holds loss, validation metric and speed of every epoch.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from slipway import artifacts, config, record, stage
from slipway.config import Params
from slipway.stage import Report
from slipway.training import loop

DATA, OUT, TRACE = Path("data/ingest"), Path("models/trained"), Path("reports/train.trace.json.gz")


def run(params: Params, report: Report) -> None:
    """Train, keep the best epoch's weights, and forget the checkpoints."""
    key = loop.key(params.workload, DATA, params.train, params.model)
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
                run=os.environ.get(record.RUN_VARIABLE, ""),
                trace=TRACE.absolute() if params.train.profile else None,
            )
        )
    report["best"] = asdict(state.best)
    report["train_seconds"] = round(state.seconds, 1)
    report["samples_per_s"] = round(state.samples / state.seconds, 1)
    report["curve"] = [asdict(point) for point in state.curve]
    for name, value in state.figures.items():
        report[name] = value
    if TRACE.exists():
        report["trace"] = TRACE
    report["loss_scale"] = [asdict(change) for change in state.loss_scale]
    loop.forget(checkpoints)


if __name__ == "__main__":
    stage.main(run)
