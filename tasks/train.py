"""Train the model on several processes with DeepSpeed; killed and run again, it goes on and ends the same.

Reads data/ingest and data/accepted.json; writes models/trained (weights.npz, model.json) and reports/train.json, whose
`curve` holds loss, validation metric and speed of every epoch.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from slipway import artifacts, config, stage
from slipway.config import Params
from slipway.stage import Report
from slipway.training import loop

DATA, OUT = Path("data/ingest"), Path("models/trained")


def run(params: Params, report: Report) -> None:
    """Train, keep the best epoch's weights, and forget the checkpoints."""
    name = loop.key(params.workload, DATA, params.train, params.model)
    checkpoints = config.home() / "checkpoints" / name
    with artifacts.writing(OUT) as beside:
        state = loop.train(loop.Job(params.workload, DATA, params.train, params.model, checkpoints, beside))
    report["best"] = asdict(state.best)
    report["train_seconds"] = round(state.seconds, 1)
    report["samples_per_s"] = round(state.samples / state.seconds, 1)
    report["curve"] = [asdict(point) for point in state.curve]
    loop.forget(checkpoints)


if __name__ == "__main__":
    stage.main(run)
