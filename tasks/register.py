"""Give the model a version in the registry, if it passed every gate.

Reads models/package, the full model in models/export, reports/evaluate.json, the name of the run in reports/train.json,
and data/ingest for the held-out samples that travel with the version.
Writes the version with its lineage into the registry, the alias `candidate`, and reports/register.json. The same
package keeps its version however often it is registered; it may be killed anywhere and run again.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slipway import artifacts, package, record, stage, store, tracking
from slipway.errors import GateError
from slipway.params import Params
from slipway.workloads.base import part

PACKAGE, EXPORT, DATA = Path("models/package"), Path("models/export"), Path("data/ingest")
TRAINING, EVALUATION = Path("reports/train.json"), Path("reports/evaluate.json")

log = logging.getLogger(__name__)


def run(params: Params, report: stage.Report) -> None:
    """Register the package of this workspace as the workload's candidate.

    Raises:
        GateError: the evaluation says that a gate was missed.
        ModelError: the package is corrupt.
    """
    evaluation = artifacts.read_json(EVALUATION)
    refuse_unless_passed(evaluation)
    sealed = package.load(PACKAGE)
    content = artifacts.sha256(PACKAGE)
    lineage = {**record.lineage(Path(), params), **metric_tags(evaluation, sealed.recipe)}
    name = os.environ.get(record.RUN_VARIABLE) or f"local-{content[:12]}"
    with tempfile.TemporaryDirectory(prefix="slipway-") as scratch:
        replay = Path(scratch) / tracking.REPLAY
        samples = part(params.workload, "export").replay(DATA, params.register_.replay_samples, params.train.seed)
        replay.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        if record.RUN_VARIABLE not in os.environ and TRAINING.exists():  # goes on in the run that got the live figures
            store.rename(str(artifacts.read_json(TRAINING).get("run")), name, store.client())
        mlflow_run = store.start(name, lineage, store.client())
        full = EXPORT / tracking.REFERENCE if sealed.recipe != "fp32" else None
        version = tracking.register(params.workload, PACKAGE, replay, mlflow_run, lineage, full)
    tracking.set_alias(params.workload, "candidate", version)
    report["workload"], report["version"], report["content"] = params.workload, version, content
    report["precision"], report["mlflow_run"], report["samples"] = sealed.precision, mlflow_run, len(samples)
    report["recipe"], report["engine"] = sealed.recipe, sealed.engine
    log.info(
        "registered %s/%s as candidate recipe=%s engine=%s", params.workload, version, sealed.recipe, sealed.engine
    )
    if record.RUN_VARIABLE not in os.environ:  # on a laptop nobody records after this; a DAG run does it at its end
        record.record(name, Path(), succeeded=True)
        store.client().set_tag(mlflow_run, "version", version)


def refuse_unless_passed(evaluation: Mapping[str, Any]) -> None:
    """Raise `GateError` for a candidate that missed a gate, naming the gate, its value and its limit."""
    if evaluation.get("passed") is True:
        return
    missed = [describe(gate) for gate in _gates(evaluation) if gate.get("passed") is False]
    raise GateError(
        f"{EVALUATION}: the candidate missed {'; '.join(missed) or 'a gate'}; it is not registered. Look at "
        f"{EVALUATION.with_suffix('.html')}, then train longer, mend the data, or change evaluate.* in params.yaml"
    )


def _gates(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    gates = evaluation.get("gates") or []
    if isinstance(gates, Mapping):
        return [{"name": name, **gate} for name, gate in gates.items()]
    return list(gates)


def describe(gate: Mapping[str, Any]) -> str:
    """Say in a few words what a gate asked and what it got."""
    return f"gate {gate.get('name')}: value {gate.get('value')}, limit {gate.get('limit')}"


def metric_tags(evaluation: Mapping[str, Any], recipe: str) -> dict[str, str]:
    """The test metrics of the recipe that is served, as tags `metric.NAME`."""
    metrics = (evaluation.get("metrics") or {}).get(recipe) or {}
    return {f"metric.{name}": f"{value:.6g}" for name, value in metrics.items() if isinstance(value, int | float)}


if __name__ == "__main__":
    stage.main(run)
