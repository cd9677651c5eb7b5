"""Any model on any data: `python -m tasks.evaluate --model M --source S`, on a real package and a real table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slipway import package
from slipway.compression import engine
from slipway.errors import ModelError
from slipway.evaluation import subject
from slipway.evaluation.subject import Subject
from tests.conftest import ROOT
from tests.serving import packages

USERS, EVENTS = 60, 8


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version's folder: a compressed model in its package, and the full one beside it."""
    folder = tmp_path_factory.mktemp("version")
    sealed = package.load(packages.seal(folder / "package"))
    (folder / "fp32.onnx").write_bytes((folder / "package" / package.MODEL).read_bytes())
    other = packages.seal(folder / "other", seed=3)  # stands for what compression made of it: it answers otherwise
    (folder / "package" / package.MODEL).write_bytes((other / package.MODEL).read_bytes())
    golden = package.load(other).golden()
    package.seal(folder / "package", "ranker", "int8", sealed.inputs, sealed.outputs, golden)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """Users' items in order, the last of them unknown to the model for some; one row is broken by a missing item."""
    rng = np.random.default_rng(0)
    users = [[packages.key(int(i)) for i in rng.integers(1, packages.ITEMS + 1, EVENTS)] for _ in range(USERS)]
    users[3][-1] = users[4][2] = "a novelty"
    path = tmp_path_factory.mktemp("table") / "events.csv"
    rows = [f"u{user:03d},{item}" for user, items in enumerate(users) for item in items]
    path.write_text("\n".join([*rows, "u000,"]) + "\n")
    return path, users


def evaluate(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    command = [sys.executable, "-m", "tasks.evaluate", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLIPWAY_HOME": str(folder / "home")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def hits(model: Path, users: list[list[str]]) -> float:
    """Share of the users whose last item is among the first ten, one at a time."""
    run, found = engine.load(model.read_bytes(), str(model)), 0
    for items in users:
        history = [int(key.removeprefix("item")) for key in items[:-1] if key != "a novelty"]
        shown = run(["items"], {"history": np.array([history])})[0][0][:10]
        found += items[-1] in {packages.key(i) for i in shown}
    return found / len(users)


def test_a_model_is_scored_on_a_table_in_both_forms(
    version: Path, table: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    path, users = table
    ended = evaluate(tmp_path, "--model", version, "--source", path, "--json", "found.json")
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["samples"] == USERS
    for precision, model in (("fp32", version / "fp32.onnx"), ("int8", version / "package" / package.MODEL)):
        value = found["metrics"][precision]["hr_at_10"]
        assert value["value"] == pytest.approx(hits(model, users), abs=1e-6), precision
        assert value["low"] <= value["value"] <= value["high"]
    assert found["left_out"]["null"] == 1
    assert [(each["what"], each["count"], each["examples"]) for each in found["unknown"]] == [
        ("items", 1, ["a novelty"])
    ]
    assert sum(each["count"] for each in found["slices"] if "history" in each["name"]) == USERS
    assert "a novelty" in ended.stdout
    assert not (tmp_path / "reports").exists(), "this workspace's own report was touched"


def test_what_is_no_model_or_no_data_is_named(version: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    for arguments, told in (
        (("--model", version, "--source", "missing.csv"), "missing.csv: no such file"),
        (("--model", "nowhere/package"), "nowhere/package: no folder of a model package"),
        (("--model", "nothing"), "nothing: not a model package"),
    ):
        ended = evaluate(tmp_path, *arguments)
        assert ended.returncode == 2, ended.stderr
        assert told in ended.stderr
        assert "Traceback" not in ended.stderr


def test_a_package_alone_is_scored_as_it_is_served(version: Path, tmp_path: Path) -> None:
    alone = tmp_path / "package"
    alone.mkdir()
    for file in (version / "package").iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    found: Subject = subject.find("ranker", str(alone))
    assert list(found.models) == ["int8"]
    (alone / package.MODEL).write_bytes(b"another")
    with pytest.raises(ModelError, match=r"model\.onnx: corrupt"):
        subject.find("ranker", str(alone))
