"""Edge packages: they run where there is no training stack, and answer as the package that they were made of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipway import artifacts, package
from slipway.compression import edge
from slipway.errors import ModelError
from slipway.package import Package
from tests.conftest import ROOT
from tests.serving import packages

# ONNX Runtime's tool that lists the operators leaves its file to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return package.load(packages.seal(tmp_path_factory.mktemp("sealed") / "package"))


def test_it_runs_apart_from_everything_and_answers_as_the_package_does(sealed: Package, tmp_path: Path) -> None:
    folder = tmp_path / "edge"
    edge.write(sealed, sealed.folder / package.MODEL, folder)
    ended = subprocess.run(
        [sys.executable, "-I", str(folder / edge.RUNNER), "--answers", str(tmp_path / "answers.npz")],
        cwd=tmp_path,
        env={},
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(ended.stdout)
    assert told["training_stack"] == []
    assert 0 < told["base_mb"] <= told["peak_mb"]
    with np.load(tmp_path / "answers.npz") as answers:
        for name, expected in sealed.golden()[1].items():
            np.testing.assert_allclose(answers[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
    about = json.loads((folder / edge.MANIFEST).read_text())
    for name, checksum in about["files"].items():
        assert artifacts.sha256(folder / name) == checksum, name
    assert {"model.ort", "golden.npz", "items.json", "operators.config", "run.py"} == set(about["files"])


def test_the_operators_of_a_build_for_this_model_are_told_without_a_path(sealed: Package, tmp_path: Path) -> None:
    edge.write(sealed, sealed.folder / package.MODEL, tmp_path / "edge")
    told = (tmp_path / "edge" / edge.OPERATORS).read_text()
    assert "TopK" in told
    assert str(tmp_path) not in told


def test_an_edge_package_that_answers_otherwise_is_refused(sealed: Package, tmp_path: Path) -> None:
    other = packages.seal(tmp_path / "other", seed=5)
    edge.write(sealed, other / package.MODEL, tmp_path / "edge")
    with pytest.raises(ModelError, match=r"output \w+ is not the golden one"):
        edge.measure(tmp_path / "edge", sealed)


def test_a_model_that_cannot_be_converted_leaves_no_package(sealed: Package, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"broken\.onnx: ONNX Runtime cannot convert it"):
        edge.write(sealed, tmp_path / "broken.onnx", tmp_path / "edge")
    assert not (tmp_path / "edge" / edge.MANIFEST).exists()


@pytest.mark.parametrize(("recipe", "precision"), [("qat", "int8"), ("prune-50", "fp32")])
def test_the_stage_writes_what_is_served_and_measures_the_full_model_beside_it(
    tmp_path: Path, recipe: str, precision: str
) -> None:
    full = package.load(packages.seal(tmp_path / "full", width=32))
    small = package.load(packages.seal(tmp_path / "models" / "package"))
    package.seal(small.folder, "ranker", precision, small.inputs, small.outputs, small.golden(), recipe=recipe)
    (tmp_path / "models" / "export").mkdir()
    (tmp_path / "models" / "export" / "fp32.onnx").write_bytes((full.folder / package.MODEL).read_bytes())
    report = exported(tmp_path)
    assert list(report["figures"]) == ["fp32", recipe]
    written = (tmp_path / "models" / "edge" / edge.MODEL).stat().st_size
    assert written == report["figures"][recipe]["size_bytes"] < report["figures"]["fp32"]["size_bytes"]


def test_the_stage_exports_a_folder_s_model_and_reports_it(sealed: Package, tmp_path: Path) -> None:
    report = exported(tmp_path, "--model", str(sealed.folder), "--out", "device")
    assert report["figures"]["fp32"]["size_bytes"] == (tmp_path / "device" / edge.MODEL).stat().st_size
    assert report["recipe"] == "fp32"


def exported(folder: Path, *arguments: str) -> dict[str, Any]:
    """What the stage reports, run in `folder`."""
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    command = [sys.executable, "-m", "tasks.export", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "SLIPWAY_HOME": str(folder / "home"), "PATH": "/usr/bin:/bin"}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "FP32" in ended.stdout
    report: dict[str, Any] = json.loads((folder / "reports" / "export.json").read_text())
    return report
