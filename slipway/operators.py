"""What the DAG files wire: operators that run stages in the run's workspace, and the form made from `params.yaml`.

The one module that imports Airflow. A stage that must be mended by the user (exit code 2) fails at once with its own
message; one that may pass by itself (75), or that was killed, is retried.
"""

from __future__ import annotations

import ast
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import BaseOperator, BaseOperatorLink, Param, TriggerRule, chain
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from slipway import artifacts, config, record, store, workspace
from slipway.commands import Command, Outcome
from slipway.errors import SlipwayError, TransientError

if TYPE_CHECKING:
    from airflow.sdk import Context

CHECKOUT = Path(__file__).resolve().parents[1]
MISSED = timedelta(hours=1)
"""A scheduled run that starts later than this was missed, as while its DAG was paused; it is skipped."""
DEFAULTS = {"retries": 2, "retry_delay": timedelta(seconds=10), "execution_timeout": timedelta(hours=24)}

VERSION = "^([a-z]+|[1-9][0-9]*)$"
"""An alias or a version number, as a form's pattern."""

Conf = Callable[[Path, Mapping[str, Any]], dict[str, Any]]
"""What a stage is handed: from the workspace's folder and the values of the form."""

log = logging.getLogger(__name__)


def form(*sections: str) -> dict[str, Param]:
    """Make the form of a DAG from `params.yaml`, with its values as defaults; all of it, or some sections."""
    fields = config.form(config.load(CHECKOUT / "params.yaml"))
    chosen = [field for field in fields if not sections or field.key.split(".")[0] in sections]
    return {
        field.key: Param(field.default, section=_heading(field.key), **{**field.schema, "title": field.key})
        for field in chosen
    }


def release_steps(conf: Conf) -> tuple[BaseOperator, BaseOperator, BaseOperator]:
    """Wire deploy, canary, chaos and promote, with the rollback of a failed one; gives deploy, promote and rollback.

    Promote stays a leaf beside rollback, so a rolled-back run is red; its own failure is rolled back by its callback.
    """
    deploy = Stage(stage="deploy", conf=conf, doc_md=describe("deploy"))
    canary, chaos = [Stage(stage=name, doc_md=describe(name)) for name in ("canary", "chaos")]
    promote = Stage(stage="promote", on_failure_callback=end_canary, doc_md=describe("promote"))
    rollback = Stage(
        stage="rollback", conf=only_canary, trigger_rule=TriggerRule.ONE_FAILED, doc_md=describe("rollback")
    )
    chain(deploy, canary, chaos, promote)
    [deploy, canary, chaos] >> rollback
    return deploy, promote, rollback


def end_canary(context: Context) -> None:
    """Give the champion all users after the last try of a promotion, however that ended; they may have moved."""
    _settle()
    name = workspace.name_of(context["dag_run"].dag_id, context["dag_run"].run_id)
    folder, extra = _worktree(name)
    command = Command("rollback", folder, name)
    outcome = command.run(["-m", "tasks.rollback"], only_canary(folder, {}), log.info, **extra)
    if outcome.code != 0:
        log.error("the canary may have users still, run `python -m tasks.rollback`: %s", command.message(outcome))


def only_canary(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Conf of the rollback in a release: the champion is not touched."""
    return {"only_canary": True}


def registered(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Conf of a deploy after a registration: the version that this run registered."""
    return {"version": artifacts.read_json(folder / "reports" / "register.json")["version"]}


def chosen(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Conf of a deploy without one: the version that the form names."""
    return {"version": values["version"]}


def target(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Conf of a rollback by hand: the version to go back to, if the form names one."""
    return {"to": values["to"]} if values["to"] else {}


def _heading(key: str) -> str:
    section, _, rest = key.partition(".")
    return section.capitalize() if rest else "Run"


def describe(stage: str) -> str:
    """Read what a stage's module says of itself, without importing it."""
    return ast.get_docstring(ast.parse((CHECKOUT / "tasks" / f"{stage}.py").read_text())) or ""


def _settle() -> None:
    """Let this process find the checkout's params.yaml and state, wherever Airflow started it."""
    os.environ.setdefault("SLIPWAY_HOME", str(CHECKOUT / ".slipway"))
    os.chdir(CHECKOUT)


def _fail(error: SlipwayError) -> AirflowException:
    return AirflowException(str(error)) if isinstance(error, TransientError) else AirflowFailException(str(error))


class RunLink(BaseOperatorLink):  # type: ignore[misc]  # mypy does not follow airflow
    """Leads from a task to the MLflow run that records the DAG run."""

    name = "MLflow run"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:
        """Give the address; empty where no MLflow server answered when the run began."""
        return _address(ti_key)


class ReportLink(BaseOperatorLink):  # type: ignore[misc]  # mypy does not follow airflow
    """Leads from a task to the report of its stage, in the MLflow run."""

    name = "Report"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:
        """Give the address of the HTML report, or of the JSON one where a stage has no other."""
        address = _address(ti_key)
        folder = workspace.read(workspace.name_of(ti_key.dag_id, ti_key.run_id)).folder if address else Path()
        html = (folder / "reports" / f"{operator.stage}.html").exists()
        return f"{address}/artifacts/reports/{operator.stage}.{'html' if html else 'json'}" if address else ""


def _address(ti_key: Any) -> str:
    with suppress(SlipwayError):
        known = workspace.read(workspace.name_of(ti_key.dag_id, ti_key.run_id))
        return store.address(known.mlflow_run) if known.mlflow_run else ""
    return ""


class OpenWorkspace(BaseOperator):  # type: ignore[misc]  # mypy does not follow airflow
    """Make the worktree of this DAG run, with the values of its form."""

    def execute(self, context: Context) -> str:
        """Give the name of the workspace."""
        run = context["dag_run"]
        if run.run_type == "scheduled" and run.run_after and datetime.now(UTC) - run.run_after > MISSED:
            raise AirflowSkipException(f"it was due at {run.run_after}, too long ago: trigger a run if one is wanted")
        _settle()
        known = {field.key for field in config.form(config.load(CHECKOUT / "params.yaml"))}
        values = {key: value for key, value in context["params"].items() if key in known}
        try:
            made = workspace.create(workspace.name_of(run.dag_id, run.run_id), CHECKOUT, values)
            workspace.begin_record(made)
        except SlipwayError as error:
            raise _fail(error) from error
        log.info("workspace %s", made.folder)
        log.info("branch %s from commit %s", made.branch, made.commit)
        return made.name


class CloseWorkspace(BaseOperator):  # type: ignore[misc]  # mypy does not follow airflow
    """Commit the run to its branch; prune its worktree, or keep it for inspection where the run failed."""

    def execute(self, context: Context) -> None:
        """Close; a run succeeded if its promotion did."""
        _settle()
        name = workspace.name_of(context["dag_run"].dag_id, context["dag_run"].run_id)
        try:
            ended = workspace.close(name, succeeded=record.promoted(workspace.read(name).folder))
        except SlipwayError as error:
            raise _fail(error) from error
        where = "pruned" if not ended.folder.exists() else f"kept for inspection: {ended.folder}"
        log.info("the run %s; branch %s; worktree %s", ended.ending, ended.branch, where)


class Stage(BaseOperator):  # type: ignore[misc]  # mypy does not follow airflow
    """Run one stage as a process of its own, its lines in the task's log as they come.

    Args:
        stage: its name: a module of `tasks`, or `record`.
        through_dvc: let DVC run it, which restores equal results from its cache instead.
        force: run it even if nothing changed, for a stage that acts on the world beside its files.
        conf: what it is handed beside `params.yaml`.
        own_folder: the run has no worktree: run in a plain folder that holds the checkout's params.yaml, and is gone
            afterwards.
    """

    operator_extra_links: ClassVar[Sequence[BaseOperatorLink]] = (RunLink(), ReportLink())
    ui_color = "#dbeafe"

    def __init__(
        self,
        *,
        stage: str,
        through_dvc: bool = False,
        force: bool = False,
        conf: Conf | None = None,
        own_folder: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(task_id=rest.pop("task_id", stage), **rest)
        self.stage, self.through_dvc, self.force = stage, through_dvc, force
        self.conf, self.own_folder = conf, own_folder
        self._command: Command | None = None

    def execute(self, context: Context) -> None:
        """Run the stage, or raise what its exit code asks for."""
        _settle()
        run = context["dag_run"]
        name = workspace.name_of(run.dag_id, run.run_id)
        folder, extra = _plain_folder(name) if self.own_folder else _worktree(name)
        try:
            self._run_stage(name, folder, self.conf(folder, context["params"]) if self.conf else {}, extra)
        finally:
            if self.own_folder:
                shutil.rmtree(folder, ignore_errors=True)

    def _run_stage(self, name: str, folder: Path, conf: Mapping[str, Any], extra: Mapping[str, str]) -> None:
        self._command = Command(self.stage, folder, name)
        outcome = self._command.run(self._arguments(), conf, log.info, **extra)
        if outcome.code == 0 and not outcome.ran:
            log.info("restored from cache: %s did not run, its inputs are equal to an earlier run's", self.stage)
        workspace.show(name, self.stage)
        if outcome.code != 0:
            raise _problem(outcome, self._command.message(outcome))

    def _arguments(self) -> list[str]:
        if self.through_dvc:
            return ["-m", "dvc", "repro", "-s", *(["-f"] if self.force else []), self.stage]
        return ["-m", f"tasks.{self.stage}"]

    def on_kill(self) -> None:
        """End the stage with all its processes when the task is ended."""
        if self._command is not None:
            self._command.end()


class Record(Stage):
    """Fill the MLflow run from the reports, also of stages that failed or were restored."""

    operator_extra_links: ClassVar[Sequence[BaseOperatorLink]] = (RunLink(),)

    def _arguments(self) -> list[str]:
        return ["-m", "slipway.record"]


def _problem(outcome: Outcome, message: str) -> AirflowException:
    """A retry can help where a stage says so, where it was killed, and where DVC did not get to start it."""
    again = outcome.code == TransientError.exit_code or outcome.code < 0 or not outcome.ran
    return AirflowException(message) if again else AirflowFailException(message)


def _worktree(name: str) -> tuple[Path, dict[str, str]]:
    try:
        known = workspace.read(name)
    except SlipwayError as error:
        raise _fail(error) from error
    if not known.folder.exists():
        raise AirflowFailException(f"{known.folder}: pruned after its run; clear the run from its first task on")
    return known.folder, {"SLIPWAY_STARTED": known.created}


def _plain_folder(name: str) -> tuple[Path, dict[str, str]]:
    folder = config.home() / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(CHECKOUT / "params.yaml", folder / "params.yaml")
    return folder, {"PYTHONPATH": str(CHECKOUT)}
