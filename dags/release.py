"""Release a registered version, without training: deploy, canary, chaos, promote.

**Trigger** opens a form: the version is an alias (`candidate` by default, `previous`, …) or a number; the other values
come from `params.yaml` and hold for this run alone.

**How to read it:** green `promote`: the version serves everybody. If deploy, canary or chaos is red, `rollback` has
kept all users with the champion, and the red task's log ends with the reason; a red `promote` has done so itself,
unless they had moved already. Each task links to its *MLflow run* and *Report*.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import Param, dag

from slipway.operators import (
    DEFAULTS,
    VERSION,
    CloseWorkspace,
    OpenWorkspace,
    Record,
    chosen,
    form,
    release_steps,
)


@dag(  # type: ignore[untyped-decorator]  # mypy does not follow airflow
    schedule=None,
    params={
        "version": Param("candidate", type="string", pattern=VERSION, section="Run", description="Alias or number."),
        **form("workload", "slo", "deploy", "canary"),
    },
    default_args=DEFAULTS,
    max_active_runs=1,
    dagrun_timeout=timedelta(days=1),
    doc_md=__doc__,
    tags=["slipway"],
)
def release() -> None:
    """Wire it."""
    workspace = OpenWorkspace(task_id="workspace").as_setup()
    deploy, promote, rollback = release_steps(chosen)
    record = Record(stage="record").as_teardown(setups=workspace)
    close = CloseWorkspace(task_id="close").as_teardown(setups=workspace)
    workspace >> deploy
    [promote, rollback] >> record >> close  # as teardowns these hide no failure: promote decides, as a leaf


release()
