"""The record of a pipeline run: one MLflow run, filled from the reports that its stages left in the workspace.

    params      every value of params.yaml, by its dotted key
    metrics     every figure of reports/STAGE.json, as STAGE/KEY; the learning curve of reports/train.json as curve/KEY,
                its history as live/KEY: training sent them already if a server answered, and equal ones are one
    tags        git commit, workload, hash of the data and of dvc.lock, version, and what became of every stage: done,
                failed, or restored (its results came from DVC's cache, and it did not run)
    artifacts   reports/ (JSON, HTML, traces), params.yaml, dvc.lock
    children    a run for each variant that `compress` tried: its figures, why it is served or not, its plots

It is read from files, not reported by the stages, because a stage that DVC restores from its cache does not run.
Filling it again changes nothing. As a command, `python -m slipway.record`, it records the workspace it stands in.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import subprocess
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from slipway import artifacts, commands, config, store
from slipway.errors import DataError, SlipwayError
from slipway.params import Params

RUN_VARIABLE, STARTED_VARIABLE = "SLIPWAY_RUN", "SLIPWAY_STARTED"
OWN = (":!params.yaml", ":!dvc.lock")  # a run's own parameters and results, which it keeps beside its code
SHOWN = 500  # characters of a param or tag that MLflow keeps
BATCH = 1000  # metrics that MLflow takes in one call

log = logging.getLogger(__name__)


def lineage(folder: Path, params: Params) -> dict[str, str]:
    """Where a workspace's results come from: code, data, pipeline, workload; as tags of a run or a version."""
    facts = {"workload": params.workload, "git_commit": git(folder, "rev-parse", "HEAD")}
    facts["git_branch"] = git(folder, "rev-parse", "--abbrev-ref", "HEAD")
    changed = git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".", *OWN).splitlines()
    facts["dirty"] = "yes" if changed else "no"
    stages = _locked_stages(folder)
    facts["dvc_lock"] = hashlib.sha256(json.dumps(stages, sort_keys=True).encode()).hexdigest() if stages else ""
    data = [out for out in stages.get("ingest", {}).get("outs", []) if str(out["path"]).startswith("data/")]
    facts["data"] = str(data[0].get("md5", "")) if data else ""
    if os.environ.get(RUN_VARIABLE):
        facts["dag_run"] = os.environ[RUN_VARIABLE]
    return {key: value for key, value in facts.items() if value}


def _locked_stages(folder: Path) -> dict[str, Any]:
    """What dvc.lock says of the stages before `register`, so that the hash is the same before and after that stage."""
    from ruamel.yaml import YAML

    path = folder / "dvc.lock"
    if not path.exists():
        return {}
    stages = YAML(typ="safe", pure=True).load(path.read_text()).get("stages") or {}
    return {name: entry for name, entry in stages.items() if name != "register"}


def git(folder: Path, *arguments: str) -> str:
    """Run git in `folder` and give what it prints; empty where git fails, such as outside of a repository."""
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def promoted(folder: Path) -> bool:
    """Whether the run in this workspace went all the way: its version serves everybody."""
    path = folder / "reports" / "promote.json"
    return path.exists() and _read(path).get("status") == "done"


def record(run: str, folder: Path, succeeded: bool, started: datetime | None = None) -> str:
    """Fill the MLflow run of the pipeline run `run` from the reports in `folder`; its id.

    Args:
        run: what names the pipeline run.
        folder: root of the workspace.
        succeeded: whether the run did what it was for; a killed stage leaves no report to tell.
        started: when the run began; a report that is older was restored from DVC's cache. None: none is taken for that.
    """
    params = config.load(folder / "params.yaml")
    reports = {path.stem: _read(path) for path in sorted((folder / "reports").glob("*.json"))}
    reports = {name: report for name, report in reports.items() if report}
    outcomes = {name: outcome(report, started) for name, report in reports.items()}
    tags = {**lineage(folder, params), **{f"stage.{name}": found for name, found in outcomes.items()}}
    if "version" in reports.get("register", {}):
        tags["version"] = str(reports["register"]["version"])
    client = store.client()
    mlflow_run = store.start(run, tags, client)
    with store.translated(f"run {run}"):
        _log(client, mlflow_run, _flat(params), reports, tags)
        _attach(client, mlflow_run, folder)
        _variants(client, run, mlflow_run, reports.get("compress", {}), folder)
        client.set_terminated(mlflow_run, "FINISHED" if succeeded else "FAILED")
    return mlflow_run


def _read(path: Path) -> dict[str, Any]:
    try:
        report = artifacts.read_json(path)
    except DataError as error:
        log.warning("left out of the record: %s", error)
        return {}
    return report if isinstance(report, dict) else {}


def outcome(report: Mapping[str, Any], started: datetime | None) -> str:
    """Say what became of a stage: done, failed, or restored (its report is older than the run)."""
    status = str(report.get("status", "done"))
    if status != "done" or started is None or "started" not in report:
        return status
    return "restored" if datetime.fromisoformat(report["started"]) < started.replace(microsecond=0) else status


def _flat(params: Params) -> dict[str, str]:
    whole = {**params.model_dump(by_alias=True), params.workload: params.model.model_dump()}
    return {key: str(value)[:SHOWN] for key, value in _leaves(whole, ".")}


def _leaves(value: Any, joint: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _leaves(below, joint, f"{prefix}{joint}{key}" if prefix else str(key))
    else:
        yield prefix, value


def _log(
    client: Any, mlflow_run: str, params: Mapping[str, str], reports: Mapping[str, Any], tags: Mapping[str, str]
) -> None:
    from mlflow.entities import Metric, Param, RunTag

    before = client.get_run(mlflow_run).data.params  # MLflow refuses to change a param, so the first record counts
    fresh = [Param(key, value) for key, value in params.items() if key not in before]
    for begin in range(0, len(fresh), 100):
        client.log_batch(mlflow_run, params=fresh[begin : begin + 100])
    client.log_batch(mlflow_run, tags=[RunTag(key, value[:SHOWN]) for key, value in tags.items()])
    figures = [Metric(*figure) for name, report in reports.items() for figure in _figures(name, report)]
    for begin in range(0, len(figures), BATCH):
        client.log_batch(mlflow_run, metrics=figures[begin : begin + BATCH])


def _figures(name: str, report: Mapping[str, Any]) -> Iterator[tuple[str, float, int, int]]:
    """Figures of a report as (key, value, time in ms, step); MLflow merges rows that are equal."""
    at = int(datetime.fromisoformat(report["started"]).timestamp() * 1000) if "started" in report else 0
    for key, value in _leaves(report, "."):
        if _is_figure(value):
            yield _legal(f"{name}/{key}"), float(value), at, 0
    for group, points in (("curve", report.get("curve")), ("live", report.get("history"))):
        for index, point in enumerate(points or []):
            yield from _at_step(group, index, point, at) if isinstance(point, Mapping) else ()


def _at_step(group: str, index: int, point: Mapping[str, Any], at: int) -> Iterator[tuple[str, float, int, int]]:
    step = int(point.get("step", point.get("epoch", index)))
    for key, value in {**point, **point.get("figures", {})}.items():
        if key not in {"step", "epoch", "at_ms"} and _is_figure(value):
            yield _legal(f"{group}/{key}"), float(value), int(point.get("at_ms", at)), step


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _legal(key: str) -> str:
    """Replace what MLflow forbids in the name of a metric."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in key)[:250]


def _attach(client: Any, mlflow_run: str, folder: Path) -> None:
    for path in sorted(p for form in ("*.json", "*.html", "*.json.gz") for p in (folder / "reports").glob(form)):
        client.log_artifact(mlflow_run, str(path), "reports")
    for name in ("params.yaml", "dvc.lock"):
        if (folder / name).exists():
            client.log_artifact(mlflow_run, str(folder / name))


def _variants(client: Any, run: str, parent: str, report: Mapping[str, Any], folder: Path) -> None:
    """Give every variant of reports/compress.json a run of its own under the pipeline's."""
    from mlflow.entities import Metric, RunTag

    choice = report.get("choice", {})
    for name, variant in report.get("variants", {}).items():
        child = store.start(f"{run}/{name}", {"mlflow.parentRunId": parent}, client)
        served = name == choice.get("recipe")
        tags = {
            "recipe": name,
            "engine": variant["engine"],
            "precision": variant["precision"],
            "front": "yes" if name in report["front"] else "no",
            "served": "yes" if served else "no",
            "reason": choice["reason"] if served else choice["refused"].get(name, ""),
        }
        figures = [Metric(*figure) for figure in _figures("variant", {**variant, "started": report["started"]})]
        client.log_batch(child, metrics=figures, tags=[RunTag(key, value[:SHOWN]) for key, value in tags.items()])
        for plot in sorted((folder / "reports" / "compress").glob(f"{name}.*.png")):
            client.log_artifact(child, str(plot), "plots")
        client.set_terminated(child, "FINISHED")


def main() -> None:
    """Record the workspace that this command stands in, under the name that its environment gives."""
    commands.log_to_stderr("INFO")
    run, began = os.environ.get(RUN_VARIABLE), os.environ.get(STARTED_VARIABLE)
    try:
        if not run:
            raise SlipwayError(f"environment: {RUN_VARIABLE} must name the pipeline run that is recorded")
        mlflow_run = record(run, Path(), promoted(Path()), datetime.fromisoformat(began) if began else None)
    except SlipwayError as error:
        print(f"record: {error}")
        raise SystemExit(error.exit_code) from error
    print(f"record: MLflow run {mlflow_run}")


if __name__ == "__main__":
    main()
