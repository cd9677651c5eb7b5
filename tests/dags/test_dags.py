"""The DAGs as Airflow sees them, and runs of `release` and `rollback`, with stages that say what they were asked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from slipway import config, workspace
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]

# A stage of the copied checkout: it keeps what it was handed; version 5 is a canary that is rejected, version 6 cannot
# be promoted.
STAGE = """
import json, os, sys
from itertools import pairwise
from pathlib import Path
name = Path(__file__).stem
conf = json.loads(os.environ["SLIPWAY_CONF"])
reports = Path("reports")
reports.mkdir(exist_ok=True)
deployed = json.loads((reports / "deploy.json").read_text()) if (reports / "deploy.json").exists() else {"conf": conf}
rejected = (name, deployed["conf"].get("version")) in {("canary", "5"), ("promote", "6")}
report = {"status": "failed" if rejected else "done", "error": "p99 over 100 ms", "conf": conf}
(reports / f"{name}.json").write_text(json.dumps(report))
Path(os.environ["SLIPWAY_HOME"], "asked").open("a").write(json.dumps([name, conf, os.getcwd()]) + "\\n")
sys.exit(2 if rejected else 0)
"""
# Its command only says that it was called, because MLflow would lay out a database: tests/test_tracking.py runs it.
RECORD = """
if __name__ == "__main__":
    Path(os.environ["SLIPWAY_HOME"], "recorded").open("a").write("x")
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy") / "checkout"
    for name in ("slipway", "tasks", "dags", ".dvc"):
        ignored = shutil.ignore_patterns("__pycache__", "tmp", "cache", "config.local")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("params.yaml", "dvc.yaml", "embedded", ".gitignore"):
        shutil.copyfile(ROOT / name, folder / name)
    for name in ("deploy", "canary", "chaos", "promote", "rollback"):
        doc = (folder / "tasks" / f"{name}.py").read_text().split('"""')[1]
        (folder / "tasks" / f"{name}.py").write_text(f'"""{doc}"""\n{STAGE}')
    module = folder / "slipway" / "record.py"
    module.write_text(module.read_text().partition('\nif __name__ == "__main__":')[0] + RECORD)
    for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-qm", "start"]):
        identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        subprocess.run(["git", "-C", str(folder), *identity, *command], check=True)
    return folder


@pytest.fixture(scope="module")
def seen(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("AIRFLOW", "SLIPWAY", "MLFLOW"))}
    environment = clean | {
        "AIRFLOW_HOME": str(tmp_path_factory.mktemp("airflow")),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_FOLDER": str(checkout / "dags"),
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "PYTHONPATH": f"{checkout}{os.pathsep}{ROOT / 'tests' / 'dags'}",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, str(ROOT / "tests" / "dags" / "drive.py"), str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=450)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["checkout"] == str(checkout)
    return found


def test_all_dags_parse_fast_and_import_nothing_heavy(seen: dict[str, Any]) -> None:
    assert seen["errors"] == {}
    assert seen["heavy"] == []
    assert sorted(seen["down"]) == ["pipeline", "release", "rollback"]
    assert max(seen["parse_s"].values()) < 30.0, seen["parse_s"]  # then Airflow gives up


def test_every_dag_and_every_stage_says_what_it_does(seen: dict[str, Any]) -> None:
    assert all(seen["docs"].values()), seen["docs"]
    assert seen["links"]["train"] == ["MLflow run", "Report"]


def test_promote_decides_and_rollback_stands_beside_it(seen: dict[str, Any]) -> None:
    for name in ("pipeline", "release"):
        down = seen["down"][name]
        assert down["promote"] == ["record"]  # a teardown, which does not count
        assert down["rollback"] == ["record"]
        assert down["canary"] == ["chaos", "rollback"]
    assert seen["teardowns"] == ["close", "record"]
    assert seen["rules"]["rollback"] == "one_failed"
    order = ["workspace", "ingest", "validate", "train", "compress", "evaluate", "register", "deploy", "canary"]
    for task, following in pairwise(order):
        assert following in seen["down"]["pipeline"][task]


def test_the_form_is_params_yaml_and_refuses_what_it_does_not_allow(seen: dict[str, Any]) -> None:
    form = seen["form"]["pipeline"]
    assert form["train.epochs"]["value"] == 16
    assert form["train.epochs"]["maximum"] == 10_000
    assert form["train.epochs"]["section"] == "Train"
    assert form["train.epochs"]["description"]
    assert form["workload"]["enum"]
    assert seen["form"]["release"]["version"]["value"] == "candidate"
    assert set(seen["refusals"]) == {"train.epochs", "workload", "canary.step_weights", "slo.p99_ms"}


def test_unpausing_starts_no_run(seen: dict[str, Any]) -> None:
    assert seen["waits_s"] > 0


def asked(checkout: Path) -> list[tuple[str, dict[str, Any], str]]:
    lines = (checkout / ".slipway" / "asked").read_text().splitlines()
    return [tuple(json.loads(line)) for line in lines]


def test_a_good_version_is_promoted_and_its_workspace_pruned(
    seen: dict[str, Any], checkout: Path, tmp_path: Path
) -> None:
    good = seen["good"]
    assert good["state"] == "success", good
    assert good["tasks"]["rollback"] == "skipped"
    name = workspace.name_of("release", good["run"])
    folder = checkout / ".slipway" / "runs" / name
    steps = [(stage, conf) for stage, conf, where in asked(checkout) if where == str(folder)]
    assert steps == [("deploy", {"version": "4"}), ("canary", {}), ("chaos", {}), ("promote", {})]
    assert not folder.exists()
    command = ["git", "-C", str(checkout), "show", f"run/{name}:params.yaml"]
    (tmp_path / "params.yaml").write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
    assert config.load(tmp_path / "params.yaml").canary.step_weights == (0.5,)


def test_a_rejected_canary_is_rolled_back_and_its_run_is_red(seen: dict[str, Any], checkout: Path) -> None:
    bad = seen["bad"]
    assert bad["state"] == "failed", bad
    assert bad["tasks"] == {
        "workspace": "success",
        "deploy": "success",
        "canary": "failed",
        "chaos": "upstream_failed",
        "promote": "upstream_failed",
        "rollback": "success",
        "record": "success",
        "close": "success",
    }
    folder = checkout / ".slipway" / "runs" / workspace.name_of("release", bad["run"])
    assert folder.exists()
    steps = [(stage, conf) for stage, conf, where in asked(checkout) if where == str(folder)]
    assert steps == [("deploy", {"version": "5"}), ("canary", {}), ("rollback", {"only_canary": True})]
    assert (checkout / ".slipway" / "recorded").read_text() == "xxx"


def test_a_promotion_that_failed_for_good_leaves_nobody_on_the_canary(seen: dict[str, Any], checkout: Path) -> None:
    stuck = seen["stuck"]
    assert (stuck["state"], stuck["tasks"]["promote"], stuck["tasks"]["rollback"]) == ("failed", "failed", "skipped")
    folder = checkout / ".slipway" / "runs" / workspace.name_of("release", stuck["run"])
    steps = [(stage, conf) for stage, conf, where in asked(checkout) if where == str(folder)]
    assert steps[-2:] == [("promote", {}), ("rollback", {"only_canary": True})]


def test_a_rollback_by_hand_needs_no_worktree_and_leaves_no_folder(seen: dict[str, Any], checkout: Path) -> None:
    back = seen["back"]
    assert back["state"] == "success", back
    folder = checkout / ".slipway" / "runs" / workspace.name_of("rollback", back["run"])
    assert ["rollback", {"to": "3"}, str(folder)] in [list(each) for each in asked(checkout)]
    assert not folder.exists()
