"""Start and follow DAG runs over Airflow's REST interface; what a person does in the web UI, for a terminal."""

from __future__ import annotations

import json
import logging
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from graphlib import TopologicalSorter
from typing import Any

from slipway import loopback
from slipway.errors import PlatformError, TransientError

TIMEOUT_S, TRIES = 30.0, 4  # of one call; of a question that only reads
ENDED = frozenset({"success", "failed"})

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One task of a run at one moment."""

    name: str
    state: str
    """Airflow's word: success, failed, running, queued, skipped, upstream_failed, …; `waiting` before all of them."""
    seconds: float
    """Time in the task so far."""
    line: str = ""
    """The last line it logged, while it runs."""


@dataclass(frozen=True)
class Snapshot:
    """One run at one moment, its tasks in the order in which they come."""

    dag: str
    run: str
    state: str
    tasks: tuple[Task, ...]
    seconds: float
    """Time since the run began, or that it took."""

    @property
    def ended(self) -> bool:
        """Whether nothing changes any more."""
        return self.state in ENDED


class Airflow:
    """A logged-in client of one Airflow."""

    def __init__(self, url: str, user: str, password: str) -> None:
        self.url = url
        self._credentials = {"username": user, "password": password}
        self._token = ""

    def trigger(self, dag: str, conf: Mapping[str, Any]) -> str:
        """Unpause a DAG and start a run of it; the id of the run.

        Raises:
            PlatformError: Airflow refuses, such as for a value that the form does not allow; says why.
        """
        self._call("PATCH", f"/api/v2/dags/{dag}", {"is_paused": False})
        answer = self._call("POST", f"/api/v2/dags/{dag}/dagRuns", {"logical_date": None, "conf": dict(conf)})
        return str(answer["dag_run_id"])

    def wait_for(self, dag: str, timeout_s: float) -> None:
        """Wait until Airflow has read the file of a DAG.

        Raises:
            PlatformError: it does not appear in time; names what Airflow could not import, if there is anything.
        """
        limit = time.monotonic() + timeout_s
        while time.monotonic() < limit:
            known = self._call("GET", "/api/v2/dags?limit=100")["dags"]
            if any(one["dag_id"] == dag for one in known):
                return
            time.sleep(1.0)
        errors = self._call("GET", "/api/v2/importErrors")["import_errors"]
        told = "; ".join(f"{e['filename']}: {e['stack_trace'].strip().splitlines()[-1]}" for e in errors)
        raise PlatformError(
            f"Airflow does not know the DAG {dag} after {timeout_s:.0f} s: {told or 'see `make status`'}"
        )

    def follow(self, dag: str, run: str, every_s: float = 1.0) -> Iterator[Snapshot]:
        """Yield the run as it is, every `every_s`, until it has ended."""
        order = self._order(dag)
        while True:
            snapshot = self._snapshot(dag, run, order)
            yield snapshot
            if snapshot.ended:
                return
            time.sleep(every_s)

    def page(self, snapshot: Snapshot) -> str:
        """Address of a run in the web UI."""
        return f"{self.url}/dags/{snapshot.dag}/runs/{urllib.parse.quote(snapshot.run)}"

    def _order(self, dag: str) -> list[str]:
        tasks = self._call("GET", f"/api/v2/dags/{dag}/tasks")["tasks"]
        graph: dict[str, set[str]] = {task["task_id"]: set() for task in tasks}
        for task in tasks:
            for follower in task["downstream_task_ids"]:
                graph[follower].add(task["task_id"])
        return list(TopologicalSorter(graph).static_order())

    def _snapshot(self, dag: str, run: str, order: list[str]) -> Snapshot:
        path = f"/api/v2/dags/{dag}/dagRuns/{urllib.parse.quote(run)}"
        told = self._call("GET", path)
        instances = {t["task_id"]: t for t in self._call("GET", f"{path}/taskInstances?limit=100")["task_instances"]}
        tasks = tuple(self._task(path, name, instances.get(name, {})) for name in order)
        return Snapshot(dag, run, str(told["state"]), tasks, _seconds(told))

    def _task(self, path: str, name: str, instance: Mapping[str, Any]) -> Task:
        state = instance.get("state") or "waiting"
        line = self._last_line(path, name, int(instance["try_number"])) if state == "running" else ""
        return Task(name, state, _seconds(instance), line)

    def _last_line(self, path: str, task: str, attempt: int) -> str:
        try:
            content = self._call("GET", f"{path}/taskInstances/{task}/logs/{attempt}")["content"]
        except (PlatformError, TransientError):  # the log of a task that has just begun is not there yet
            return ""
        lines = [str(entry.get("event", "")).strip() for entry in content if isinstance(entry, dict)]
        told = [line for line in lines if line and not line.startswith("::")]
        return told[-1] if told else ""

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        if not self._token:
            self._token = self._request("POST", "/auth/token", self._credentials)["access_token"]
        for _ in range(TRIES - 1 if method == "GET" else 0):  # on a busy machine it may answer late
            try:
                return self._request(method, path, body)
            except TransientError as error:
                log.info("asking again: %s", error)
                time.sleep(1.0)
        return self._request(method, path, body)

    def _request(self, method: str, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with loopback.urlopen(request, timeout=TIMEOUT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace")
            raise PlatformError(f"Airflow refused {method} {path}: {error.code} {told[:500]}") from error
        except (OSError, ValueError) as error:
            raise TransientError(f"Airflow does not answer on {self.url}: {error}; see `make status`") from error


def _seconds(instance: Mapping[str, Any]) -> float:
    began = instance.get("start_date")
    if not began:
        return 0.0
    start = datetime.fromisoformat(began)
    end = instance.get("end_date")
    return ((datetime.fromisoformat(end) if end else datetime.now(start.tzinfo)) - start).total_seconds()
