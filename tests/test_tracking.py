"""The registry and the run record, on a real MLflow store and, for the light client, its real server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import Any
from wsgiref.simple_server import make_server

import numpy as np
import pytest

from slipway import artifacts, config, package, record, store, tracking
from slipway.errors import DivergedError, GateError, ModelError, RegistryError, TransientError
from slipway.training import live
from tasks import register as stage_register
from tests.conftest import ROOT, free_port
from tests.ranker import data
from tests.serving import bare

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow.*"),
    pytest.mark.filterwarnings("ignore:starlette.middleware.wsgi is deprecated"),  # MLflow imports it
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),  # MLflow's engines end with the process
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder with a store of its own, for all tests of this file: laying one out takes MLflow long."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("SLIPWAY_HOME", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(tmp_path_factory.mktemp("empty"))  # no params.yaml here, so the default port, which is not ours
        yield folder


@pytest.fixture(scope="module")
def run(home: Path) -> str:
    return store.start("tests", {})


def seal(folder: Path, weight: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"%d" % weight)
    inputs = (package.TensorSpec("history", "int64", (None, None)),)
    outputs = (package.TensorSpec("items", "int64", (None, 3)),)
    package.seal(folder, "ranker", "int8", inputs, outputs, ({"history": np.zeros((1, 2))}, {"items": np.ones((1, 3))}))
    return folder


@pytest.fixture
def replay(tmp_path: Path) -> Path:
    path = tmp_path / "replay.jsonl"
    path.write_text('{"user": "u"}\n')
    return path


def test_before_anything_is_registered_there_are_no_aliases_and_a_reference_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path))
    assert tracking.alias("ranker", "champion") is None
    with pytest.raises(RegistryError, match="no version has the alias 'candidate'"):
        tracking.resolve("ranker", "candidate")
    with pytest.raises(RegistryError, match="dvc repro -s -f register"):
        tracking.resolve("ranker", "3")
    assert not (tmp_path / "mlflow").exists()


def test_a_package_has_one_version_however_often_and_by_however_many_it_is_registered(
    run: str, tmp_path: Path, replay: Path
) -> None:
    one, two = seal(tmp_path / "one", 1), seal(tmp_path / "two", 2)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda p: tracking.register("often", p, replay, run, {"git_commit": "abc"}), [one] * 4))
    assert found == ["1"] * 4
    assert tracking.register("often", two, replay, run, {}) == "2"
    tags = store.light().get_model_version("often", "1").tags
    assert tags["git_commit"] == "abc"
    assert tags["precision"] == "int8"
    assert json.loads(tags["signature"])["inputs"][0]["name"] == "history"
    assert (tracking.fetch("often", "2") / "package" / "model.onnx").read_bytes() == b"2"


def test_aliases_move_and_are_removed_however_often(run: str, tmp_path: Path, replay: Path) -> None:
    for weight in (1, 2):
        tracking.register("named", seal(tmp_path / str(weight), weight), replay, run, {})
    for _ in range(2):
        tracking.set_alias("named", "champion", "1")
    tracking.set_alias("named", "candidate", "1")
    tracking.set_alias("named", "champion", "2")
    assert tracking.resolve("named", "champion") == "2"
    assert tracking.resolve("named", "candidate") == "1"
    for _ in range(2):
        tracking.set_alias("named", "candidate", None)
    assert tracking.aliases("named") == {"champion": "2"}
    with pytest.raises(RegistryError, match="version=9"):
        tracking.set_alias("named", "champion", "9")
    with pytest.raises(RegistryError, match=r"'previous' \(aliases: champion = 2\)"):
        tracking.resolve("named", "previous")


@pytest.mark.parametrize("torn", ["package/model.onnx", "replay.jsonl", "fp32.onnx", "version.json"])
def test_a_torn_copy_is_fetched_again(run: str, tmp_path: Path, replay: Path, torn: str) -> None:
    (tmp_path / tracking.REFERENCE).write_bytes(b"the full model")
    version = tracking.register("torn", seal(tmp_path / "one", 1), replay, run, {}, tmp_path / tracking.REFERENCE)
    copy = tracking.fetch("torn", version)
    (copy / torn).write_bytes(b"torn")
    assert tracking.fetch("torn", version) == copy
    tracking.verify(copy)


def test_a_version_that_is_corrupt_everywhere_is_refused_and_registering_it_again_mends_it(
    run: str, tmp_path: Path, replay: Path
) -> None:
    sealed = seal(tmp_path / "one", 77)
    version = tracking.register("lost", sealed, replay, run, {})
    copy = tracking.fetch("lost", version)
    for path in [*store.artifacts_of(run).rglob("model.onnx"), copy / "package" / "model.onnx"]:
        if path.read_bytes() == b"77":
            path.write_bytes(b"torn")
    with pytest.raises(ModelError, match="both corrupt.*model.onnx"):
        tracking.fetch("lost", version)
    assert tracking.register("lost", sealed, replay, run, {}) == version
    assert tracking.fetch("lost", version) == copy


def test_a_copy_is_given_and_made_with_what_a_replica_has_and_so_without_mlflow(
    run: str, tmp_path: Path, replay: Path
) -> None:
    version = tracking.register("light", seal(tmp_path / "one", 1), replay, run, {})
    tracking.set_alias("light", "champion", version)
    code = "from slipway import tracking; tracking.fetch('light', tracking.resolve('light', 'champion'))"
    alone = {**os.environ, "PYTHONPATH": bare.make(tmp_path / "site")}
    copy = tracking.fetch("light", version)
    for _ in range(2):
        subprocess.run([sys.executable, *bare.ALONE, "-c", code], check=True, env=alone)
        (copy / "version.json").unlink()  # the second time there is no copy
    tracking.fetch("light", version)


def tamper(copy: Path, tmp_path: Path) -> None:
    """Put a whole package of another model in the place of a copy's, and its checksum into the copy's own record."""
    shutil.rmtree(copy / "package")
    seal(copy / "package", 666)
    content = artifacts.sha256(copy / "package")
    artifacts.write_json(copy / "version.json", {**artifacts.read_json(copy / "version.json"), "content": content})
    tracking.verify(copy)  # whole in itself


def test_a_copy_that_is_whole_but_not_the_registrys_is_never_given(run: str, tmp_path: Path, replay: Path) -> None:
    version = tracking.register("forged", seal(tmp_path / "one", 55), replay, run, {})
    copy = tracking.fetch("forged", version)
    tamper(copy, tmp_path)
    assert (tracking.fetch("forged", version) / "package" / "model.onnx").read_bytes() == b"55"
    tamper(copy, tmp_path)
    for path in store.artifacts_of(run).rglob("model.onnx"):
        if path.read_bytes() == b"55":
            path.write_bytes(b"666")  # the registry's own files are forged, too
    command = [sys.executable, "-m", "slipway.serving", "--model", f"forged/{version}", "--port", str(free_port())]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert "both corrupt" in done.stderr


def test_a_version_that_the_registry_does_not_know_is_not_given_from_a_copy(
    run: str, tmp_path: Path, replay: Path
) -> None:
    version = tracking.register("known", seal(tmp_path / "one", 5), replay, run, {})
    copy = tracking.fetch("known", version)
    shutil.copytree(copy, copy.with_name("9"))
    with pytest.raises(RegistryError, match="known/9: no such version"):
        tracking.fetch("known", "9")


def test_a_registry_that_is_silent_keeps_no_copy_from_use(
    run: str, tmp_path: Path, replay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = tracking.register("alone", seal(tmp_path / "one", 6), replay, run, {})
    copy = tracking.fetch("alone", version)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    assert tracking.fetch("alone", version) == copy
    (copy / "package" / "model.onnx").write_bytes(b"torn")
    with pytest.raises(TransientError, match="MLflow does not answer"):
        tracking.fetch("alone", version)


def workspace(folder: Path, reports: dict[str, dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    for name, report in reports.items():
        artifacts.write_json(folder / "reports" / f"{name}.json", report)
    (folder / "reports" / "validate.html").write_text("<p>fine</p>")
    return folder


def test_a_record_holds_every_figure_and_filling_it_again_changes_nothing(home: Path, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    before, after = [(now + timedelta(minutes=m)).isoformat(timespec="seconds") for m in (-5, 5)]
    reports: dict[str, dict[str, Any]] = {
        "ingest": {"status": "done", "started": before, "seconds": 2.5, "users": 10},
        "train": {"status": "done", "started": after, "curve": [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}]},
        "evaluate": {"status": "done", "started": after, "metrics": {"int8": {"hr_at_10": 0.25}}, "passed": True},
        "register": {"status": "done", "started": after, "version": "4"},
    }
    folder = workspace(tmp_path / "run", reports)
    found = {record.record("pipeline-1", folder, succeeded=True, started=now) for _ in range(2)}
    assert len(found) == 1
    client, mlflow_run = store.client(), found.pop()
    filled = client.get_run(mlflow_run)
    assert filled.info.status == "FINISHED"
    assert filled.data.metrics["evaluate/metrics.int8.hr_at_10"] == 0.25
    assert filled.data.params["train.epochs"] == str(config.load(folder / "params.yaml").train.epochs)
    assert filled.data.params["ranker.width"] == str(config.load(folder / "params.yaml").model.model_dump()["width"])
    tags = filled.data.tags
    assert (tags["stage.ingest"], tags["stage.train"], tags["version"]) == ("restored", "done", "4")
    curve = client.get_metric_history(mlflow_run, "curve/loss")
    assert [(m.step, m.value) for m in sorted(curve, key=lambda m: m.step)] == [(1, 2.0), (2, 1.0)]
    assert {a.path for a in client.list_artifacts(mlflow_run, "reports")} >= {"reports/validate.html"}


def test_every_variant_of_compress_has_a_run_under_the_pipeline_s(home: Path, tmp_path: Path) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    variant = {"engine": "onnxruntime", "precision": "fp32", "metric": 0.5, "latency_ms": {"1": 2.0}}
    variants = {"fp32": variant, "int8": {**variant, "precision": "int8", "metric": 0.4, "latency_ms": {"1": 1.0}}}
    choice = {"recipe": "fp32", "reason": "int8 loses too much", "refused": {"int8": "loses 20.0% of the metric"}}
    compressed = {"status": "done", "started": now, "variants": variants, "choice": choice, "front": ["fp32", "int8"]}
    folder = workspace(tmp_path / "run", {"compress": compressed})
    (folder / "reports" / "compress").mkdir()
    (folder / "reports" / "compress" / "int8.pareto.png").write_bytes(b"a picture")
    (parent,) = {record.record("pipeline-3", folder, succeeded=True) for _ in range(2)}
    client = store.client()
    found = client.search_runs(
        [client.get_run(parent).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'", max_results=10
    )
    children = {run.data.tags["recipe"]: run for run in found}
    assert len(found) == 2
    assert children["int8"].data.metrics["variant/latency_ms.1"] == 1.0
    assert children["int8"].data.tags["reason"] == "loses 20.0% of the metric"
    assert (children["fp32"].data.tags["served"], children["int8"].data.tags["served"]) == ("yes", "no")
    plots = client.list_artifacts(children["int8"].info.run_id, "plots")
    assert [artifact.path for artifact in plots] == ["plots/int8.pareto.png"]


def test_a_run_that_was_not_promoted_makes_a_failed_record(home: Path, tmp_path: Path) -> None:
    folder = workspace(tmp_path / "run", {"train": {"status": "failed", "error": "no"}, "torn": {}})
    (folder / "reports" / "torn.json").write_text("{")
    mlflow_run = record.record("pipeline-2", folder, succeeded=record.promoted(folder))
    filled = store.client().get_run(mlflow_run)
    assert filled.info.status == "FAILED"
    assert filled.data.tags["stage.train"] == "failed"


def test_a_candidate_that_missed_a_gate_is_refused_with_the_gate_its_value_and_its_limit() -> None:
    gates = [
        {"name": "min_metric", "value": 0.004, "limit": 0.01, "passed": False},
        {"name": "max_latency_ms", "value": 1.0, "limit": 50.0, "passed": True},
    ]
    with pytest.raises(GateError, match=r"gate min_metric: value 0\.004, limit 0\.01; it is not registered") as caught:
        stage_register.refuse_unless_passed({"passed": False, "gates": gates})
    assert "max_latency_ms" not in str(caught.value)
    with pytest.raises(GateError):
        stage_register.refuse_unless_passed({})
    stage_register.refuse_unless_passed({"passed": True, "gates": gates})


@pytest.fixture
def server(run: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """MLflow's server over the store of this file, on the port that this folder's params.yaml names."""
    from mlflow.server import app
    from mlflow.server.handlers import initialize_backend_stores

    port = free_port()
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("18082", str(port)))
    file = f"sqlite:///{home / 'mlflow' / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", file)  # so that it is unset in the end: the next line sets it, too
    initialize_backend_stores(file, file, str(home / "mlflow" / "artifacts"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    # MLflow's own application in a thread: as a process it would import for half a minute what is imported here.
    with make_server("127.0.0.1", port, app) as serving:
        thread = Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{port}"
        serving.shutdown()
        thread.join()


def test_the_light_client_and_mlflows_own_see_one_store(server: str, run: str, tmp_path: Path, replay: Path) -> None:
    file = f"sqlite:///{store.folder() / 'mlflow.db'}"
    assert store.locate() == store.Location(server, own=True)
    assert isinstance(store.light(), store.Rest)
    version = tracking.register("both", seal(tmp_path / "one", 1), replay, run, {})
    tracking.set_alias("both", "champion", version)
    light = store.light().get_model_version("both", version).tags
    assert light["precision"] == "int8"
    assert tracking.resolve("both", "champion") == version
    own = store._client(file).get_model_version_by_alias("both", "champion")
    assert (str(own.version), dict(own.tags)) == (version, light)
    assert store.start("tests", {}) == run
    assert store.start("another", {}) == store.start("another", {}, store._client(file))
    assert store.address(run).endswith(f"/runs/{run}")
    made = store.Rest(server).create_experiment("fresh", None, {"kind": "test"})
    assert store._client(file).get_experiment(made).tags["kind"] == "test"
    for _ in range(2):
        tracking.set_alias("both", "champion", None)
    assert tracking.aliases("both") == {}
    with pytest.raises(RegistryError, match="both/9: no such version"):
        tracking.resolve("both", "9")
    copy = tracking.fetch("both", version)
    (copy / "version.json").unlink()
    assert tracking.fetch("both", version) == copy


@pytest.mark.slow
def test_training_shows_its_figures_while_it_runs_and_the_record_adds_none_twice(
    server: str, home: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    turned = {"train.epochs": 30, "train.batch_size": 16, "ranker.width": 16, "ranker.max_length": 8}
    folder.mkdir()
    (folder / "params.yaml").write_text((tmp_path / "params.yaml").read_text())
    config.override(folder / "params.yaml", turned)
    data.write(folder / "data" / "ingest", data.steps(users=400, items=30))
    environment = {**os.environ, "SLIPWAY_RUN": "pipeline-live", "PYTHONPATH": str(ROOT)}
    rest, seen = store.Rest(server), 0
    with subprocess.Popen([sys.executable, "-m", "tasks.train"], cwd=folder, env=environment) as training:
        while training.poll() is None:
            time.sleep(0.5)
            if training.poll() is None:
                seen = max(seen, len(_history(rest, "live/loss")))
    assert training.returncode == 0
    assert seen > 1, "no figure arrived while the model trained"
    history = artifacts.read_json(folder / "reports" / "train.json")["history"]
    arrived = _history(rest, "live/loss")
    assert len(arrived) >= len(history)
    mlflow_run = store.start("pipeline-live", {})
    assert store.client().get_run(mlflow_run).info.status == "RUNNING", "a pipeline run goes on after its training"
    assert record.record("pipeline-live", folder, succeeded=True) == mlflow_run
    assert _history(rest, "live/loss") == arrived
    assert {row["step"] for row in arrived} >= {sample["step"] for sample in history}
    assert len(_history(rest, "curve/metric")) == 30
    kept = store.client().get_run(mlflow_run).data.metrics
    assert {"live/mfu", "live/sequences_per_s", "live/data_share", "train/time_share.forward", "train/mfu"} <= set(kept)


def _history(rest: store.Rest, key: str) -> list[dict[str, Any]]:
    """What MLflow has of a metric of the run above; empty while there is no such run."""
    experiment = rest.get_experiment_by_name(store.EXPERIMENT)
    runs = rest.search_runs([experiment.experiment_id], f"tags.`{store.RUN_TAG}` = 'pipeline-live'")
    if not runs:
        return []
    found = rest.call("GET", "metrics/get-history", run_id=runs[0].info.run_id, metric_key=key).get("metrics", [])
    return sorted(found, key=lambda row: int(row["step"]))


def test_training_that_nobody_records_ends_its_run_as_it_ended_itself(server: str) -> None:
    def status(run: str) -> str:
        return str(store.client().get_run(store.start(run, {})).info.status)

    def train(run: str, end: Callable[[], None]) -> str:
        with live.ended(run):
            told = live.Live(run)
            told.put("live", 1, 1, {"loss": 1.0})
            told.close()
            assert status(run) == "RUNNING"
            end()
        return status(run)

    def diverge() -> None:
        raise DivergedError("the loss is no number")

    with pytest.raises(KeyboardInterrupt):
        train("train-1", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert status("train-1") == "KILLED"
    assert train("train-1", lambda: None) == "FINISHED", "it was run again and went on"
    with pytest.raises(DivergedError):
        train("train-2", diverge)
    assert status("train-2") == "FAILED"


def test_a_run_on_a_laptop_goes_on_in_the_one_that_got_its_live_figures(home: Path) -> None:
    client, first = store.client(), store.start("train-abc", {})
    store.rename("train-abc", "local-1", client)
    assert store.start("local-1", {}) == first
    second = store.start("train-abc", {})
    assert second != first
    store.rename("train-abc", "local-1", client)
    store.rename("nobody", "local-2", client)
    assert store.start("local-1", {}) == first
    assert client.get_run(first).info.run_name == "local-1"
