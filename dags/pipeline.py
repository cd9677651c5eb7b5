"""From the events to a promoted model: data, training, compression, gates, registration, and a release step by step.

**Trigger** opens a form: every value comes from `params.yaml` and holds for that run alone. Weekly it runs by itself.

| task | what it does |
|---|---|
| workspace | makes a git worktree for the run, on branch `run/…`; your checkout is never touched |
| ingest … register | the DVC pipeline; a stage with the inputs of an earlier run is *restored from cache* |
| deploy, canary, chaos | bring the version up, give it users in steps, and let a replica die while they watch |
| promote | makes it the champion |
| rollback | runs only if a step of the release failed: all users stay with the champion |
| record, close | fill the MLflow run, also of a failed run; prune the worktree, or keep it for inspection |

**How to read it:** green `promote`: the new version serves everybody. Red: the first red task's log ends with one line
that says what to mend; users were not touched. Each task links to its *MLflow run* and its *Report*.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import CronTriggerTimetable, chain, dag

from slipway.operators import (
    DEFAULTS,
    CloseWorkspace,
    OpenWorkspace,
    Record,
    Stage,
    describe,
    form,
    registered,
    release_steps,
)

WEEKLY = CronTriggerTimetable("0 3 * * 1", timezone="UTC", run_immediately=timedelta(0))  # not at once when unpaused


@dag(  # type: ignore[untyped-decorator]  # mypy does not follow airflow
    schedule=WEEKLY,
    catchup=False,
    params=form(),
    default_args=DEFAULTS,
    max_active_runs=1,
    dagrun_timeout=timedelta(days=3),
    doc_md=__doc__,
    tags=["slipway"],
)
def pipeline() -> None:
    """Wire it."""
    workspace = OpenWorkspace(task_id="workspace").as_setup()
    cached = ("ingest", "validate", "train", "compress")
    stages = [Stage(stage=name, through_dvc=True, doc_md=describe(name)) for name in cached]
    # These two look at the registry, of which DVC knows nothing, so they always run: a cached report may have been
    # judged against an earlier champion, or speak of another checkout's registry.
    for name in ("evaluate", "register"):
        stages.append(Stage(stage=name, through_dvc=True, force=True, doc_md=describe(name)))
    deploy, promote, rollback = release_steps(registered)
    record = Record(stage="record").as_teardown(setups=workspace)
    close = CloseWorkspace(task_id="close").as_teardown(setups=workspace)
    chain(workspace, *stages, deploy)
    [promote, rollback] >> record >> close  # as teardowns these hide no failure: promote decides, as a leaf


pipeline()
