"""Where MLflow keeps runs and versions, and two ways to it: a light one for a few calls, and MLflow's own client.

Importing mlflow costs seconds of processor time, too much for a rollback, and a replica has none. While the stack's
server runs, the few calls that a release needs go to its REST interface directly, and what a replica reads of a store
without a server is read from its database; everything else takes the library's client. All have the same method names,
so the callers do not know which one they got.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import sqlite3
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from slipway import config, locks, loopback
from slipway.errors import RegistryError, TransientError
from slipway.params import StackParams

PROBE_S, TIMEOUT_S = 5.0, 30.0  # a server that does not say within the first who it is, is passed by
EXPERIMENT = "slipway"
RUN_TAG = "slipway.run"


@dataclass(frozen=True)
class Location:
    """A store: its tracking URI, and whether it is the one of this state folder."""

    uri: str
    own: bool

    @property
    def server(self) -> bool:
        """Whether a server answers for it."""
        return self.uri.startswith("http")


def folder() -> Path:
    """The folder of this state folder's own store: mlflow.db and artifacts/."""
    return config.home() / "mlflow"


def locate() -> Location:
    """Find the store: $MLFLOW_TRACKING_URI, else the stack's server if it serves this state folder, else its file."""
    file = f"sqlite:///{folder() / 'mlflow.db'}"
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return Location(given, given == file or _serves_home(given))
    server = f"http://127.0.0.1:{_port()}"
    return Location(server, True) if _serves_home(server) else Location(file, True)


def exists() -> bool:
    """Whether there is a store to ask; laying one out takes MLflow long, and a reader needs none."""
    return not locate().uri.startswith("sqlite:///") or Path(locate().uri.removeprefix("sqlite:///")).exists()


def _port() -> int:
    stack = config.load().stack if config.PARAMS_FILE.exists() else StackParams()
    return stack.mlflow_port


def _serves_home(uri: str) -> bool:
    """Whether the server at `uri` and the file of this state folder are one store: both were made in one millisecond.

    Another checkout's stack may hold the port; its store must not get our versions.
    """
    file = folder() / "mlflow.db"
    if not uri.startswith("http://127.0.0.1:") or not file.exists():
        return False
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=PROBE_S)) as database:
            row = database.execute("SELECT creation_time FROM experiments WHERE experiment_id = 0").fetchone()
        theirs = Rest(uri, PROBE_S).call("GET", "experiments/get", experiment_id="0")["experiment"]["creation_time"]
    except (sqlite3.Error, TransientError, StoreError, KeyError):
        return False
    return row is not None and int(row[0]) == int(theirs)


class StoreError(Exception):
    """MLflow's server refused a call."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.error_code = code


class Rest:
    """The few calls of a release, with MLflow's own names, over its REST interface."""

    def __init__(self, uri: str, timeout_s: float = TIMEOUT_S) -> None:
        self._uri, self._timeout_s = uri.rstrip("/"), timeout_s

    def call(self, method: str, path: str, /, **fields: Any) -> dict[str, Any]:
        """Make one call; the answer as plain JSON.

        Raises:
            StoreError: the server refused, with MLflow's error code.
            TransientError: it does not answer.
        """
        url, body = f"{self._uri}/api/2.0/mlflow/{path}", None
        if method == "GET":
            url += "?" + urllib.parse.urlencode(fields)
        else:
            body = json.dumps(fields).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method=method)
        try:
            with loopback.urlopen(request, timeout=self._timeout_s) as answer:
                value: dict[str, Any] = json.loads(answer.read() or b"{}")
                return value
        except urllib.error.HTTPError as error:
            raise _refusal(error) from error
        except (OSError, ValueError) as error:
            raise TransientError(f"{self._uri}: MLflow does not answer ({error}); is the stack up?") from error

    def get_registered_model(self, name: str) -> Any:
        """A model with its aliases."""
        model = self.call("GET", "registered-models/get", name=name)["registered_model"]
        return SimpleNamespace(aliases={a["alias"]: str(a["version"]) for a in model.get("aliases", [])})

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        """Move or make an alias."""
        self.call("POST", "registered-models/alias", name=name, alias=alias, version=version)

    def delete_registered_model_alias(self, name: str, alias: str) -> None:
        """Remove an alias."""
        self.call("DELETE", "registered-models/alias", name=name, alias=alias)

    def get_model_version(self, name: str, version: str) -> Any:
        """A version with its tags."""
        found = self.call("GET", "model-versions/get", name=name, version=version)["model_version"]
        return SimpleNamespace(**{**found, "tags": {t["key"]: t["value"] for t in found.get("tags", [])}})

    def download_artifacts(self, run_id: str, path: str, folder: str) -> str:
        """Fetch a folder of a run's artifacts into `folder`; where it lies then.

        Raises:
            StoreError: there is no such folder, or it names files outside of itself.
        """
        files = self.call("GET", "artifacts/list", run_id=run_id, path=path).get("files", [])
        if not files:
            raise StoreError("RESOURCE_DOES_NOT_EXIST", f"run {run_id} has no artifacts under {path}")
        place = Path(folder, path)
        place.mkdir(parents=True, exist_ok=True)
        for name in (str(file["path"]) for file in files):
            if str(Path(name).parent) != path or Path(name).name in {"", ".."}:
                raise StoreError("INVALID_PARAMETER_VALUE", f"{name} does not lie in {path}")
        for file in files:
            if file.get("is_dir"):
                self.download_artifacts(run_id, file["path"], folder)
            else:
                self._download(run_id, file["path"], Path(folder, file["path"]))
        return str(place)

    def _download(self, run_id: str, path: str, to: Path) -> None:
        url = f"{self._uri}/get-artifact?" + urllib.parse.urlencode({"run_uuid": run_id, "path": path})
        try:
            with loopback.urlopen(url, timeout=self._timeout_s) as answer, to.open("wb") as file:
                shutil.copyfileobj(answer, file)
        except urllib.error.HTTPError as error:
            raise _refusal(error) from error
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(f"{self._uri}: MLflow does not give {path} ({error})") from error

    def get_experiment_by_name(self, name: str) -> Any:
        """An experiment, or None."""
        try:
            found = self.call("GET", "experiments/get-by-name", experiment_name=name)["experiment"]
        except StoreError as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return SimpleNamespace(**found)

    def create_experiment(self, name: str, artifact_location: str | None, tags: Mapping[str, str]) -> str:
        """Make an experiment; its id."""
        place = {"artifact_location": artifact_location} if artifact_location else {}
        return str(self.call("POST", "experiments/create", name=name, tags=_pairs(tags), **place)["experiment_id"])

    def search_runs(self, experiment_ids: list[str], filter_string: str, max_results: int = 1) -> list[Any]:
        """Runs that match a filter."""
        found = self.call(
            "POST", "runs/search", experiment_ids=experiment_ids, filter=filter_string, max_results=max_results
        )
        return [SimpleNamespace(info=SimpleNamespace(**run["info"])) for run in found.get("runs", [])]

    def create_run(self, experiment_id: str, tags: Mapping[str, str], run_name: str) -> Any:
        """Make a run."""
        made = self.call(
            "POST",
            "runs/create",
            experiment_id=experiment_id,
            run_name=run_name,
            start_time=int(time.time() * 1000),
            tags=_pairs(tags),
        )["run"]
        return SimpleNamespace(info=SimpleNamespace(**made["info"]))

    def update_run(self, run_id: str, status: str) -> None:
        """Set the status of a run that goes on."""
        self.call("POST", "runs/update", run_id=run_id, status=status)

    def set_terminated(self, run_id: str, status: str) -> None:
        """End a run now."""
        self.call("POST", "runs/update", run_id=run_id, status=status, end_time=int(time.time() * 1000))


class File:
    """What a replica reads of MLflow's database, with MLflow's own names; nothing is written."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _rows(self, query: str, *values: str) -> list[Any]:
        try:
            with closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, timeout=PROBE_S)) as database:
                return database.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise StoreError("TEMPORARILY_UNAVAILABLE", f"{self._path}: {error}") from error

    def get_registered_model(self, name: str) -> Any:
        """A model with its aliases."""
        if not self._rows("SELECT name FROM registered_models WHERE name = ?", name):
            raise StoreError("RESOURCE_DOES_NOT_EXIST", f"Registered Model with name={name} not found")
        found = self._rows("SELECT alias, version FROM registered_model_aliases WHERE name = ?", name)
        return SimpleNamespace(aliases={alias: str(version) for alias, version in found})

    def get_model_version(self, name: str, version: str) -> Any:
        """A version with its tags."""
        query = "SELECT run_id FROM model_versions WHERE name = ? AND version = ? AND current_stage != ?"
        found = self._rows(query, name, version, "Deleted_Internal")
        if not found:
            raise StoreError("RESOURCE_DOES_NOT_EXIST", f"Model Version (name={name}, version={version}) not found")
        tags = self._rows("SELECT key, value FROM model_version_tags WHERE name = ? AND version = ?", name, version)
        return SimpleNamespace(run_id=found[0][0], tags=dict(tags))

    def download_artifacts(self, run_id: str, path: str, folder: str) -> str:
        """Copy a folder of a run's artifacts into `folder`; where it lies then."""
        found = self._rows("SELECT artifact_uri FROM runs WHERE run_uuid = ?", run_id)
        place = urllib.parse.urlsplit(found[0][0] if found else "")
        if place.scheme not in {"", "file"}:
            return str(client().download_artifacts(run_id, path, folder))
        copy = shutil.copytree(Path(urllib.parse.unquote(place.path), path), Path(folder, path), dirs_exist_ok=True)
        return str(copy)


def _pairs(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in tags.items()]


def _refusal(error: urllib.error.HTTPError) -> Exception:
    text = error.read().decode(errors="replace")
    try:
        answer = json.loads(text)
        return StoreError(str(answer["error_code"]), str(answer["message"]))
    except (ValueError, KeyError, TypeError):
        return TransientError(f"{error.url}: MLflow answered {error.code}: {text[:200]}")


def light() -> Any:
    """A client for a release's few calls: without importing mlflow while a server answers."""
    place = locate()
    return Rest(place.uri) if place.server else client()


def reader() -> Any:
    """A client that only reads versions, aliases and artifacts: without importing mlflow wherever that can be."""
    place = locate()
    file = place.uri.removeprefix("sqlite:///")
    return File(Path(file)) if file != place.uri else light()


def client() -> Any:
    """MLflow's own client."""
    return _client(locate().uri)


@lru_cache(maxsize=4)
def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    from mlflow.tracking import MlflowClient

    with locks.held("mlflow"), translated(uri):  # two first users at once would both lay out the database
        made = MlflowClient(tracking_uri=uri, registry_uri=uri)
        made.search_registered_models(max_results=1)
    return made


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Make the store's errors ours."""
    try:
        yield
    except Exception as error:
        code = getattr(error, "error_code", None)  # MLflow's class is known only once mlflow is imported
        if code is None:
            raise
        message = " ".join(str(error).split())
        if code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS"}:
            raise RegistryError(f"{what}: {message}") from error
        raise TransientError(f"{what}: MLflow failed ({code}): {message[:300]}") from error


def start(run: str, tags: Mapping[str, str], through: Any = None) -> str:
    """Give the id of the MLflow run of the pipeline run `run`, which is made if there is none.

    Args:
        run: what names the pipeline run; one name has one MLflow run, however often it is started.
        tags: tags of a new run.
        through: a client; by default a light one.
    """
    through = through or light()
    with locks.held("experiment"), translated(f"run {run}"):
        experiment = _experiment(through)
        quoted = run.replace("'", "")
        found = through.search_runs([experiment], f"tags.`{RUN_TAG}` = '{quoted}'", max_results=1)
        made = found[0] if found else through.create_run(experiment, tags={**tags, RUN_TAG: quoted}, run_name=quoted)
    return str(made.info.run_id)


def end(run: str, status: str, through: Any) -> None:
    """End the MLflow run of the pipeline run `run`, if there is one, as FINISHED, FAILED or KILLED."""
    with locks.held("experiment"), translated(f"run {run}"):
        for found in through.search_runs([_experiment(through)], f"tags.`{RUN_TAG}` = '{run}'"):
            through.set_terminated(found.info.run_id, status)


def rename(run: str, to: str, through: Any) -> None:
    """Give the MLflow run of the pipeline run `run` to `to`, unless there is none, or `to` has one already."""
    with locks.held("experiment"), translated(f"run {run}"):
        experiment = _experiment(through)
        mine, theirs = [through.search_runs([experiment], f"tags.`{RUN_TAG}` = '{name}'") for name in (run, to)]
        if mine and not theirs:
            for tag in (RUN_TAG, "mlflow.runName"):
                through.set_tag(mine[0].info.run_id, tag, to)


def artifacts_of(run_id: str) -> Path:
    """Folder of a run's artifacts in this state folder's own store."""
    return folder() / "artifacts" / EXPERIMENT / run_id / "artifacts"


def address(run_id: str) -> str:
    """Address of a run in MLflow's web UI; empty where no server answers."""
    place = locate()
    if not place.server:
        return ""
    experiment = Rest(place.uri).call("GET", "runs/get", run_id=run_id)["run"]["info"]["experiment_id"]
    return f"{place.uri}/#/experiments/{experiment}/runs/{run_id}"


def _experiment(through: Any) -> str:
    found = through.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    # Own artifacts lie under plain paths, so that they are found with and without a server.
    place = (folder() / "artifacts" / EXPERIMENT).as_uri() if locate().own else None
    # The kind opens MLflow's pages of model training; without it they are those of language-model traces.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    return str(through.create_experiment(EXPERIMENT, artifact_location=place, tags=tags))
