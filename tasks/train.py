"""Train the model on several processes with DeepSpeed; killed and run again, it goes on and ends the same.

Reads data/ingest and data/accepted.json; writes models/trained (weights.npz, model.json), the page reports/train.html
and reports/train.json: `curve` has loss, validation metric and speed of every epoch, `history` has speed, utilisation,
gradient, memory, traffic and shares of the time, every few steps (slipway/training/meter.py says which). While it runs,
a MLflow server that answers gets them too. With `train.profile` there is reports/train.trace.json.gz, for Perfetto.

On several nodes start this once on each, with the same params.yaml and data, a SLIPWAY_HOME that all of them share, and
in the environment NNODES, NODE_RANK (from 0), MASTER_ADDR and MASTER_PORT (of node 0), as torchrun takes them, or with
PET_ before, as Kubeflow sets them. Each starts its share of `train.world_size` processes; node 0 writes all of the
above, the others nothing but their logs. When a process or a node is killed, all start again from the last checkpoint.

`--plan` prints instead what each ZeRO stage would need of memory, and which one `train.zero: auto` takes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from slipway import artifacts, config, record, stage
from slipway.params import Params
from slipway.stage import Report, Show
from slipway.training import live, loop, page, plan, rendezvous, survey

DATA, OUT = Path("data/ingest"), Path("models/trained")
PAGE, TRACE = Path("reports/train.html"), Path("reports/train.trace.json.gz")


def run(params: Params, report: Report) -> None:
    """Train, keep the best epoch's weights, and forget the checkpoints."""
    node = rendezvous.here()
    if node.rank:
        report.discard()
    train = survey.resolve(params, DATA)
    key = loop.key(params.workload, DATA, train, params.model)
    name = os.environ.get(record.RUN_VARIABLE) or f"train-{key}"
    checkpoints = config.home() / "checkpoints" / key
    trace = TRACE.absolute() if train.profile else None
    job = loop.Job(params.workload, DATA, train, params.model, checkpoints, OUT, run=name, trace=trace)
    if node.rank:
        loop.train(job, node)
        return
    TRACE.unlink(missing_ok=True)
    alone = live.ended(name) if record.RUN_VARIABLE not in os.environ else nullcontext()
    with alone, artifacts.writing(OUT) as beside:
        state = loop.train(replace(job, out=beside), node)
    found: dict[str, Any] = {"workload": params.workload, "run": name, "best": asdict(state.best)}
    found["zero"], found["offload"] = train.zero, train.offload
    found["train_seconds"], found["samples_per_s"] = round(state.seconds, 1), round(state.samples / state.seconds, 1)
    found["curve"], found["loss_scale"] = [[asdict(each) for each in some] for some in (state.curve, state.loss_scale)]
    found |= state.figures
    for name, value in found.items():
        report[name] = value
    if TRACE.exists():
        report["trace"] = TRACE
    page.write(PAGE, found, params.train.epochs)
    loop.forget(checkpoints)


def show(params: Params, asked: Mapping[str, str]) -> None:
    """Print the memory plan.

    Raises:
        ParamsError: nothing fits.
    """
    params = survey.asked(params, asked)
    elements = asked.get("parameters")
    found = survey.survey(params, DATA) if elements is None else survey.hypothetical(elements, params)
    Console(width=None if sys.stdout.isatty() else 150).print(
        plan.table(found.rows, found.model, params.train.precision, found.machine),
        *plan.notes(found.model, params.train.precision, found.machine),
        sep="\n",
    )
    if found.machine.device is not None and plan.cheapest(found.rows) is None:
        raise plan.refuse(found.rows, found.machine)


PLAN = Show(
    "plan",
    "print what each ZeRO stage needs of memory, with and without offload, and the cheapest that fits; train nothing",
    None,
    {
        "parameters": "plan for a model of this many parameters instead, such as 13e9; without activations",
        "devices": "plan for this many devices, such as 8",
        "precision": "fp32, bf16 or fp16",
        "memory": "of one device, in GB",
    },
    show,
)

if __name__ == "__main__":
    stage.main(run, shows=PLAN)
