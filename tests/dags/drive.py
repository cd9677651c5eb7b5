"""Run inside a process of its own, with Airflow's environment set before its first import: parse the DAGs of a checkout
and run `release` thrice, `rollback` once; print what was seen as one line of JSON."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HEAVY = ("torch", "mlflow", "pandas", "great_expectations", "duckdb", "numpy")


def structure(bag: Any) -> dict[str, Any]:
    from airflow.serialization.serialized_objects import DagSerialization
    from airflow.timetables.base import TimeRestriction

    stored = {name: DagSerialization.from_dict(DagSerialization.to_dict(dag)) for name, dag in bag.dags.items()}
    info = stored["pipeline"].timetable.next_dagrun_info(
        last_automated_data_interval=None, restriction=TimeRestriction(None, None, catchup=False)
    )
    return {
        "errors": bag.import_errors,
        "docs": {name: bool(dag.doc_md) and all(task.doc_md for task in stages(dag)) for name, dag in bag.dags.items()},
        "down": {n: {t.task_id: sorted(t.downstream_task_ids) for t in dag.tasks} for n, dag in bag.dags.items()},
        "teardowns": sorted(t.task_id for t in bag.dags["pipeline"].tasks if t.is_teardown),
        "rules": {t.task_id: t.trigger_rule.value for t in bag.dags["pipeline"].tasks},
        "links": {t.task_id: sorted(t.operator_extra_link_dict) for t in stored["pipeline"].tasks},
        "waits_s": (info.run_after - datetime.now(UTC)).total_seconds(),
        "form": {name: {key: field(dag.params.get_param(key)) for key in dag.params} for name, dag in bag.dags.items()},
    }


def field(param: Any) -> dict[str, Any]:
    return {**param.schema, "value": param.value, "description": param.description}


def stages(dag: Any) -> list[Any]:
    return [task for task in dag.tasks if task.task_id not in {"workspace", "record", "close"}]


def refusals(dag: Any) -> dict[str, str]:
    from airflow.sdk.exceptions import ParamValidationError

    found = {}
    for key, value in (("train.epochs", 0), ("workload", "nope"), ("canary.step_weights", [2]), ("slo.p99_ms", "x")):
        try:
            dag.params.get_param(key).resolve(value)
        except ParamValidationError as error:
            found[key] = str(error)
    return found


def run(dag: Any, conf: dict[str, Any]) -> dict[str, Any]:
    ended = dag.test(run_conf=conf)
    states = {instance.task_id: str(instance.state) for instance in ended.get_task_instances()}
    return {"state": str(ended.state), "tasks": states, "run": ended.run_id}


def main(checkout: Path) -> None:
    import airflow.sdk  # noqa: F401  (what it costs is Airflow's own)

    began = time.monotonic()
    import slipway.operators

    imported_s, heavy = time.monotonic() - began, [name for name in HEAVY if name in sys.modules]
    from airflow.dag_processing.dagbag import DagBag
    from airflow.utils.db import initdb

    bag = DagBag(str(checkout / "dags"))
    seen = structure(bag)
    seen["refusals"] = refusals(bag.dags["pipeline"])
    seen["parse_s"] = {s.file: s.duration.total_seconds() for s in bag.dagbag_stats}
    seen["import_s"], seen["heavy"], seen["checkout"] = imported_s, heavy, str(slipway.operators.CHECKOUT)
    initdb()
    seen["good"] = run(bag.dags["release"], {"version": "4", "canary.step_weights": [0.5]})
    seen["bad"] = run(bag.dags["release"], {"version": "5"})
    seen["stuck"] = run(bag.dags["release"], {"version": "6"})
    seen["back"] = run(bag.dags["rollback"], {"to": "3"})
    print("\n" + json.dumps(seen, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
