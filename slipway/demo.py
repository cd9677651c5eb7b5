"""`make demo`: from a table of events to a promoted model behind the gateway, then a bad model that is rolled back.

Everything happens in the real Airflow of the local stack; this only starts the runs, shows how they go, and sums up.
"""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import rich.markup
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from slipway import artifacts, config, store, tracking, workspace
from slipway.errors import PlatformError, SlipwayError
from slipway.params import Params
from slipway.platforms.local import gateway
from slipway.platforms.local.airflow import USER, password_file
from slipway.platforms.local.layout import here
from slipway.platforms.local.unix_http import UnixConnection
from slipway.release import replay
from slipway.runs import Airflow, Snapshot, Task

MARKS = {
    "success": ("✔", "green"),
    "failed": ("✘", "red"),
    "upstream_failed": ("✘", "red"),
    "running": ("▶", "cyan"),
    "up_for_retry": ("↻", "yellow"),
    "skipped": ("-", "dim"),
    "waiting": ("·", "dim"),
}
LOOK: dict[str, Any] = {"box": SIMPLE_HEAD, "title_justify": "left", "title_style": "bold"}
DAG_TIMEOUT_S = 120.0


def main() -> int:
    """Run the demo; 0 when both releases ended as they must."""
    logging.basicConfig(level=logging.WARNING)
    console = Console(highlight=False)
    began = time.monotonic()
    try:
        params = config.load()
        _start_stack()
        airflow = connect(params)
        good = show(airflow, "pipeline", {}, console)
        if good.state != "success":
            raise PlatformError(f"the pipeline failed; its tasks and logs: {airflow.page(good)}")
        bad = _release_bad_candidate(airflow, console)
        _summarise(console, params, airflow, good, bad)
        console.print(f"\nAll of it took {time.monotonic() - began:.0f} s. `make down` ends every process.")
    except SlipwayError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def connect(params: Params) -> Airflow:
    """Log in to the local stack's Airflow, with the password that it made for itself."""
    password = artifacts.read_json(_password_file())[USER]
    return Airflow(f"http://127.0.0.1:{params.stack.airflow_port}", USER, password)


def _password_file() -> Path:
    return password_file(config.home() / "airflow")


def show(airflow: Airflow, dag: str, conf: dict[str, Any], console: Console) -> Snapshot:
    """Start a run and show it until it has ended: a live table on a terminal, elsewhere a line for each change."""
    airflow.wait_for(dag, DAG_TIMEOUT_S)
    run = airflow.trigger(dag, conf)
    console.print(f"\n[bold]{dag}[/]  {airflow.url}/dags/{dag}/runs/{run}", soft_wrap=True)
    snapshots = airflow.follow(dag, run)
    return _live(snapshots, console) if console.is_terminal else _lines(snapshots, console)


def _live(snapshots: Iterable[Snapshot], console: Console) -> Snapshot:
    with Live(console=console, refresh_per_second=4) as live:
        for snapshot in snapshots:
            live.update(_table(snapshot))
    return snapshot


def _lines(snapshots: Iterable[Snapshot], console: Console) -> Snapshot:
    told: dict[str, str] = {}
    for snapshot in snapshots:
        for task in snapshot.tasks:
            if told.get(task.name, "waiting") != task.state and task.state not in {"scheduled", "queued"}:
                console.print(Text.assemble(_mark(task), f" {task.name:<10} {task.state:<16} {task.seconds:5.1f} s"))
                told[task.name] = task.state
    return snapshot


def _table(snapshot: Snapshot) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    for task in snapshot.tasks:
        seconds = f"{task.seconds:.0f} s" if task.seconds else ""
        line = Text(task.line[-100:], style="dim", no_wrap=True, overflow="ellipsis")
        table.add_row(_mark(task), task.name, Text(seconds, justify="right"), line)
    return table


def _mark(task: Task) -> Text:
    sign, style = MARKS.get(task.state, ("…", "dim"))
    return Text(sign, style=style)


def _start_stack() -> None:
    started = subprocess.run([sys.executable, "-m", "slipway.platforms.local", "up"], check=False)
    if started.returncode != 0:
        raise PlatformError("the local stack did not come up; what it said stands above")


def _release_bad_candidate(airflow: Airflow, console: Console) -> Snapshot:
    """Release a copy of the champion whose answers are shuffled: only live users can tell, and the canary does.

    Raises:
        PlatformError: it was not rolled back.
    """
    console.print("\nNow a bad model: the champion with its answers shuffled. It passes every check before the canary.")
    made = subprocess.run(
        [sys.executable, "-m", "benchmarks.bad_candidate"], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        raise PlatformError(f"could not make the bad candidate: {made.stderr.strip()}")
    snapshot = show(airflow, "release", {"version": "candidate"}, console)
    states = {task.name: task.state for task in snapshot.tasks}
    if (states["canary"], states["rollback"], states["promote"]) != ("failed", "success", "upstream_failed"):
        raise PlatformError(f"the bad candidate was not rolled back as it should be: {airflow.page(snapshot)}")
    return snapshot


def _summarise(console: Console, params: Params, airflow: Airflow, good: Snapshot, bad: Snapshot) -> None:
    console.print(_stages(good))
    console.print(_metrics(reports_of(good)))
    canary = artifacts.read_json(reports_of(bad) / "canary.json")
    console.print(
        f"\n[bold]The bad model[/] was rolled back: {'; '.join(canary['reasons'])}.\n"
        f"{canary['seconds_verdict_to_zero_traffic']:.2f} s from the verdict to zero traffic; "
        f"{canary['replayed']['failed']} of {canary['replayed']['requests']} users' requests failed."
    )
    console.print(_places(params, airflow, console.is_terminal))
    console.print(_try_it(params), soft_wrap=True)


def reports_of(snapshot: Snapshot) -> Path:
    """Where a run's reports are: in its worktree while that is kept, then in its MLflow run."""
    run = workspace.read(workspace.name_of(snapshot.dag, snapshot.run))
    kept = run.folder / "reports"
    return kept if kept.exists() else store.artifacts_of(run.mlflow_run) / "reports"


def _stages(snapshot: Snapshot) -> Table:
    table = Table("stage", "outcome", Column("time", justify="right"), title="\nThe pipeline", **LOOK)
    for task in snapshot.tasks:
        table.add_row(task.name, Text.assemble(_mark(task), f" {task.state}"), f"{task.seconds:.1f} s")
    return table


def _metrics(reports: Path) -> Table:
    found = artifacts.read_json(reports / "evaluate.json")["metrics"]
    table = Table(
        "metric", *(Column(name, justify="right") for name in found), title="\nThe model on test data", **LOOK
    )
    for metric in next(iter(found.values())):
        table.add_row(metric, *(f"{values[metric]:.4f}" for values in found.values()))
    return table


def _places(params: Params, airflow: Airflow, may_show_password: bool) -> Table:
    file = _password_file()
    near = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file  # short enough for a line
    secret = artifacts.read_json(file)[USER] if may_show_password else f"in {near}"
    table = Table("where", "address", Column("login", overflow="fold"), title="\nLook around", **LOOK)
    table.add_row("live page", f"http://127.0.0.1:{params.stack.page_port}", "none: loopback only")
    table.add_row("Airflow", airflow.url, f"user {USER}, password {secret}")
    table.add_row("MLflow", f"http://127.0.0.1:{params.stack.mlflow_port}", "none: loopback only")
    table.add_row("Prometheus", f"http://127.0.0.1:{params.stack.prometheus_port}", "none: loopback only")
    table.add_row("service", gateway.url(params), "a token" if here().tokens_file.exists() else "none: loopback only")
    return table


def _try_it(params: Params) -> str:
    """One request that the reader can repeat, and the answer that it got just now."""
    version = tracking.resolve(params.workload, "champion")
    path, samples = replay.samples(params.workload, version)
    body = {**samples[0]["request"], "k": 5}
    connection = UnixConnection(here().inner_socket, timeout_s=5.0)
    connection.request("POST", path, json.dumps(body))
    told = json.dumps(json.loads(connection.getresponse().read()))
    connection.close()
    token = " -H 'Authorization: Bearer TOKEN'" if here().tokens_file.exists() else ""
    command = f"curl -s {gateway.url(params)}{path}{token} -d {shlex.quote(json.dumps(body))}"
    return f"\n[bold]Try it[/]\n{command}\n{rich.markup.escape(told)}"


if __name__ == "__main__":
    sys.exit(main())
