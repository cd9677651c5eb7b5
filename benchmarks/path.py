"""The whole path: the wall time of every stage and of what Airflow adds to it, then a release under steady load.

    make up && python -m benchmarks.path

Triggers the DAG `pipeline` of the running stack, with the parameters of params.yaml. A stage that DVC restores from its
cache is named so: the first run after `make clean && make up` shows all of them at work. Then it runs
`benchmarks.release`. Prints tables and writes benchmarks/results/path.json and release.json.
"""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import release
from slipway import artifacts, config, demo, record, workspace
from slipway.errors import DataError
from slipway.runs import Snapshot

RESULTS = Path(__file__).parent / "results" / "path.json"
LINE = "{:<12}{:>10}{:>10}{:>11}  {}"


def row(snapshot: Snapshot, name: str, reports: Path, began: datetime) -> dict[str, Any]:
    """Split one task's time into the stage's own and what DVC and Airflow add."""
    task = next(task for task in snapshot.tasks if task.name == name)
    try:
        report = artifacts.read_json(reports / f"{name}.json")
    except DataError:  # workspace, record and close leave no report: they are Airflow's part altogether
        report = {"seconds": 0.0}
    outcome = record.outcome(report, began)
    own_s = 0.0 if outcome == "restored" else float(report["seconds"])
    return {"task": name, "state": task.state, "outcome": outcome, "task_s": task.seconds, "stage_s": own_s}


def pipeline() -> dict[str, Any]:
    """Run the DAG once and give the time of each task, in seconds."""
    airflow = demo.connect(config.load())
    airflow.wait_for("pipeline", demo.DAG_TIMEOUT_S)
    run = airflow.trigger("pipeline", {})
    *_, last = airflow.follow("pipeline", run)
    known = workspace.read(workspace.name_of("pipeline", run))
    reports = demo.reports_of(last)
    ran = [task.name for task in last.tasks if task.seconds]
    rows = [row(last, name, reports, datetime.fromisoformat(known.created)) for name in ran]
    stages_s = sum(r["stage_s"] for r in rows)
    return {"state": last.state, "tasks": rows, "wall_s": last.seconds, "stages_s": stages_s}


def main() -> None:
    """Run both halves and print them."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    path = pipeline()
    print(LINE.format("task", "task s", "stage s", "Airflow s", "outcome"))
    for r in path["tasks"]:
        added_s = r["task_s"] - r["stage_s"]
        print(LINE.format(r["task"], f"{r['task_s']:.1f}", f"{r['stage_s']:.1f}", f"{added_s:.1f}", r["outcome"]))
    share = 1 - path["stages_s"] / path["wall_s"]
    print(f"all of it {path['wall_s']:.1f} s, the stages themselves {path['stages_s']:.1f} s: ", end="")
    print(f"processes, DVC and Airflow add {share:.0%}\n")
    artifacts.write_json(RESULTS, path)
    release.run()


if __name__ == "__main__":
    main()
