"""Workspaces of DAG runs, with real git and real DVC on a checkout of one tiny stage."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slipway import config, workspace
from slipway.commands import Command, Outcome, end_left_over
from slipway.errors import DataError, ParamsError

PIPELINE = """
stages:
  ingest:
    cmd: python -m tasks.ingest
    deps: [tasks/ingest.py]
    params: [train.epochs]
    outs: [data/ingest, reports/ingest.json]
"""

STAGE = """
import json, os, sys
from pathlib import Path
epochs = int(Path("params.yaml").read_text().split("epochs:")[1].split()[0])
print("epochs", epochs, "conf", os.environ.get("SLIPWAY_CONF"), flush=True)
Path("reports").mkdir(exist_ok=True)
if epochs >= 100:
    Path("reports/ingest.json").write_text(json.dumps({"status": "failed", "error": "too many epochs"}))
    if epochs == 199:
        os.kill(os.getpid(), 9)
    sys.exit(75 if epochs == 175 else 2)
Path("data").mkdir(exist_ok=True)
Path("data/ingest").write_text(str(epochs))
Path("reports/ingest.json").write_text(json.dumps({"status": "done"}))
"""


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@localhost")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "checkout"
    for name, text in {
        "params.yaml": "workload: ranker\n\ntrain:\n  epochs: 2\n\ningest:\n  source: embedded\n",
        "dvc.yaml": PIPELINE,
        "embedded": "embedded\n",
        "tasks/__init__.py": "",
        "tasks/ingest.py": STAGE,
        ".gitignore": "/data/\n/reports/\n/.slipway/\n__pycache__/\n",
        ".dvc/config": "[cache]\n    dir = ../.slipway/dvc-cache\n[core]\n    analytics = false\n",
        ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(tmp_path, "init", "-q", "-b", "main", str(folder))
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "start")
    monkeypatch.setenv("SLIPWAY_HOME", str(folder / ".slipway"))
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


def repro(folder: Path, run: str) -> tuple[Outcome, list[str], Command]:
    lines: list[str] = []
    command = Command("ingest", folder, run)
    outcome = command.run(["-m", "dvc", "repro", "-s", "ingest"], {"a": "'; exit 9"}, lines.append)
    return outcome, lines, command


def test_a_run_has_its_own_parameters_and_the_checkout_stays_as_it_was(checkout: Path) -> None:
    (checkout / "embedded").write_text("changed, and not committed\n")
    made = workspace.create("one", checkout, {"train.epochs": 7})
    assert config.load(made.folder / "params.yaml").train.epochs == 7
    assert made.dirty
    assert (made.folder / "embedded").read_text() == "embedded\n"
    assert git(checkout, "status", "--porcelain") == "M embedded"
    assert made.commit == git(checkout, "rev-parse", "HEAD")
    assert config.load(checkout / "params.yaml").train.epochs == 2


def test_a_workspace_is_made_once_and_half_made_ones_are_mended(checkout: Path) -> None:
    first = workspace.create("one", checkout, {"train.epochs": 7})
    (first.folder / "work").write_text("half done")
    assert workspace.create("one", checkout, {"train.epochs": 7}) == first
    assert (first.folder / "work").exists()
    torn = config.home() / "runs" / "two"  # a process that was killed within `git worktree add`
    git(checkout, "worktree", "add", "-q", "-b", "run/two", str(torn), "HEAD")
    (torn / ".git").unlink()
    assert (workspace.create("two", checkout, {}).folder / ".dvc" / "config.local").exists()


@pytest.mark.parametrize(
    ("values", "told"), [({"train.epochs": 0}, "train.epochs"), ({"train.epoch": 3}, "epoch: unknown key")]
)
def test_a_value_that_is_not_allowed_leaves_nothing_behind(
    checkout: Path, values: dict[str, object], told: str
) -> None:
    with pytest.raises(ParamsError, match=told):
        workspace.create("bad", checkout, values)
    assert not (config.home() / "runs" / "bad").exists()
    assert git(checkout, "branch", "--list", "run/bad") == ""


def test_a_source_that_git_does_not_track_is_found_in_the_checkout(checkout: Path) -> None:
    (checkout / "data").mkdir()
    (checkout / "data" / "mine.csv").write_text("u,i\n")
    made = workspace.create("one", checkout, {"ingest.source": "data/mine.csv"})
    assert config.load(made.folder / "params.yaml").ingest.source == str(checkout / "data" / "mine.csv")
    with pytest.raises(DataError, match=r"nowhere\.csv: no such file"):
        workspace.create("two", checkout, {"ingest.source": "nowhere.csv"})


def test_two_workspaces_made_at_once_are_both_whole(checkout: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda n: workspace.create(f"w{n}", checkout, {"train.epochs": n + 1}), range(4)))
    assert [config.load(w.folder / "params.yaml").train.epochs for w in made] == [1, 2, 3, 4]


def test_only_the_newest_failed_workspaces_are_kept(checkout: Path) -> None:
    for n in range(workspace.KEEP_FAILED + 1):
        workspace.create(f"w{n}", checkout, {})
        workspace.close(f"w{n}", succeeded=False)
    assert not (config.home() / "runs" / "w0").exists()
    assert (config.home() / "runs" / "w1").exists()
    assert git(checkout, "branch", "--list", "run/w0") != ""


@pytest.mark.slow
def test_a_finished_run_is_pruned_and_its_branch_is_up_to_date_in_the_checkout(checkout: Path) -> None:
    made = workspace.create("one", checkout, {"train.epochs": 7})
    outcome, lines, _ = repro(made.folder, "one")
    assert (outcome.code, outcome.ran) == (0, True), lines
    assert any(line.startswith("epochs 7 conf") for line in lines)
    assert not any("git add" in line for line in lines)  # DVC's advice is not for a workspace
    workspace.close("one", succeeded=True)
    assert not made.folder.exists()
    assert git(checkout, "status", "--porcelain") == ""

    again = workspace.create("two", checkout, {"train.epochs": 7})
    outcome, lines, _ = repro(again.folder, "two")
    assert (outcome.code, outcome.ran) == (0, False), lines
    assert (again.folder / "data" / "ingest").read_text() == "7"

    git(checkout, "checkout", "-q", "run/one")
    subprocess.run([sys.executable, "-m", "dvc", "checkout", "-q"], cwd=checkout, check=True)
    outcome, lines, _ = repro(checkout, "three")
    assert any("didn't change, skipping" in line for line in lines), lines
    assert git(checkout, "status", "--porcelain") == ""


@pytest.mark.slow
def test_a_result_whose_cached_copy_is_corrupt_is_made_anew(checkout: Path) -> None:
    first = workspace.create("one", checkout, {"train.epochs": 7})
    assert repro(first.folder, "one")[0].code == 0
    workspace.close("one", succeeded=True)
    torn = [path for path in (config.home() / "dvc-cache" / "files").rglob("*") if path.is_file()]
    for path in torn:
        path.chmod(0o644)
        path.write_bytes(b"torn")
    assert torn

    again = workspace.create("two", checkout, {"train.epochs": 7})
    outcome, lines, _ = repro(again.folder, "two")
    assert (outcome.code, outcome.ran) == (0, True), lines
    assert (again.folder / "data" / "ingest").read_text() == "7"


@pytest.mark.parametrize(
    ("epochs", "code", "told"),
    [(175, 75, "too many epochs"), (199, -9, "ended by SIGKILL")],
)
def test_the_exit_code_and_the_message_of_a_stage_come_through_dvc(
    checkout: Path, epochs: int, code: int, told: str
) -> None:
    made = workspace.create("one", checkout, {"train.epochs": epochs})
    outcome, lines, command = repro(made.folder, "one")
    assert (outcome.code, outcome.ran) == (code, True), lines
    assert told in command.message(outcome)


def test_a_stage_that_is_ended_takes_all_that_it_started_with_it(tmp_path: Path, checkout: Path) -> None:
    code = "import subprocess; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    command, lines = Command("train", tmp_path, "ended"), []

    def say(line: str) -> None:
        lines.append(int(line))
        command.end()

    outcome = command.run(["-c", code], {}, say)
    assert outcome.code == -15
    assert command.message(outcome) == "train: ended by SIGTERM"
    assert not Path(f"/proc/{lines[0]}/cmdline").exists() or not Path(f"/proc/{lines[0]}/cmdline").read_bytes()


def test_a_process_whose_caller_was_killed_is_ended_before_its_stage_runs_again(tmp_path: Path) -> None:
    left = subprocess.Popen(
        ["sleep", "60"], env={**os.environ, "SLIPWAY_RUN": "mine", "SLIPWAY_STAGE": "s"}, start_new_session=True
    )
    other = subprocess.Popen(
        ["sleep", "60"], env={**os.environ, "SLIPWAY_RUN": "other", "SLIPWAY_STAGE": "s"}, start_new_session=True
    )
    try:
        end_left_over("mine", "s")
        assert left.wait(30) == -15
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
        left.kill()
