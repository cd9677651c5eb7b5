"""Go back, at once: a canary in progress loses its users; without one, the version before the champion takes over.

**Trigger**, or an alert, may name a version in `to`; empty means the version before. Run twice it does nothing more.
When Airflow is down, `python -m tasks.rollback` in the checkout does the same.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import Param, dag

from slipway.operators import DEFAULTS, VERSION, Stage, describe, target


@dag(  # type: ignore[untyped-decorator]  # mypy does not follow airflow
    schedule=None,
    params={
        "to": Param(
            None,
            type=["null", "string"],
            pattern=VERSION,
            title="to",
            description="Version to go back to: an alias or a number; empty: the one before.",
        )
    },
    default_args=DEFAULTS,
    max_active_runs=1,
    dagrun_timeout=timedelta(minutes=30),
    doc_md=__doc__,
    tags=["slipway"],
)
def rollback() -> None:
    """Wire it."""
    Stage(stage="rollback", conf=target, own_folder=True, doc_md=describe("rollback"))


rollback()
