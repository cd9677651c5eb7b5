from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from slipway import artifacts, stage
from slipway.errors import DataError
from slipway.workloads.classifier import images
from tasks import validate
from tests.classifier import data, faults
from tests.conftest import ROOT

CLASSES = {"train/cat": 40, "train/dog": 40, "validation/cat": 8, "validation/dog": 8}


@pytest.fixture(scope="module", autouse=True)
def _great_expectations() -> None:
    """Import it once: its own imports warn of modules that Python deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import great_expectations  # noqa: F401


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.folder(tmp_path_factory.mktemp("clean") / "pictures", CLASSES)


Validate = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def validated(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Validate:
    """Ingest pictures, harmed if wished, and run the stage: its exit code and report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path / "home"))

    def run(
        harm: Callable[[Path], object] = lambda root: None, limits: dict[str, Any] | None = None, **wanted: Any
    ) -> tuple[int, dict[str, Any]]:
        shutil.rmtree("pictures", ignore_errors=True)
        shutil.copytree(clean, "pictures")
        harm(Path("pictures"))
        given = data.params("pictures", limits, **wanted)
        data.read(given, validate.DATA)
        code = stage.call("validate", lambda report: validate.run(given, report))
        report: dict[str, Any] = artifacts.read_json(Path("reports/validate.json"))
        return code, report

    return run


def test_good_pictures_are_accepted_and_others_are_held_against_them(validated: Validate) -> None:
    code, report = validated()
    assert (code, report["verdict"], report["compared"]) == (0, "passed", False), report
    assert "Nothing was refused, and no two pictures look alike." in validate.PAGE.read_text()
    code, report = validated(lambda root: data.folder(root, {"train/cow": 60, "validation/cow": 1}, first=300))
    assert (code, report["verdict"], report["compared"]) == (0, "warning", True)
    assert report["figures"]["psi"] > 0.2
    code, report = validated(
        lambda root: [path.unlink() for path in (root / "train").glob("*/0[0-1]*.jpg")], {"min_class_pictures": 30}
    )
    assert code == 2
    assert "the pictures have not dwindled since the accepted version" in report["error"]
    assert re.search("every class has enough pictures to train on: .*class=cat", report["error"])


def test_every_fault_is_listed_with_its_file_and_shown(validated: Validate) -> None:
    code, report = validated(
        lambda root: faults.write(root / "train/cat"), {"max_unusable_ratio": 0.2}, **faults.LIMITS
    )
    assert (code, report["verdict"]) == (0, "passed"), report
    read = images.load(validate.DATA)
    rows = data.files(read)
    for name, fault in faults.FAULTS.items():
        assert (rows[f"train/cat/{name}"]["fault"], rows[f"train/cat/{name}"]["fate"]) == (fault, "fault"), name
    for name, note in faults.NOTES.items():
        row = rows[f"train/cat/{name}"]
        assert note in row["notes"].split(), name
        assert row["fate"] in ("train", "validation")
    page = validate.PAGE.read_text()
    assert page.count("data:image/jpeg;base64,") >= len(faults.FAULTS) + len(faults.NOTES)
    assert all(f"train/cat/{name}" in page for name in faults.FAULTS)
    code, report = validated(
        lambda root: faults.write(root / "train/cat"), {"max_unusable_ratio": 0.0}, **faults.LIMITS
    )
    assert code == 2
    assert re.search("few files are no picture, .* first: name=train/cat/bomb.png fault=huge", report["error"])


def leak(root: Path) -> None:
    """Save a held-out picture again among those to train on, and a training picture under another class."""
    with Image.open(root / "validation/cat/003.jpg") as image:
        image.resize((45, 30)).save(root / "train/cat/copy.jpg", quality=80)
    with Image.open(root / "train/cat/005.jpg") as image:
        image.save(root / "train/dog/wrong.jpg", quality=60)


def test_a_training_picture_that_repeats_a_held_out_one_is_left_out_and_shown_beside_it(validated: Validate) -> None:
    code, report = validated(leak)
    assert (code, report["verdict"]) == (0, "warning"), report
    assert any("of=validation/cat/003.jpg" in warning for warning in report["warnings"])
    assert report["figures"]["near_conflicts"] == 1
    assert data.files(images.load(validate.DATA))["train/cat/copy.jpg"]["fate"] == "leak"
    page = validate.PAGE.read_text()
    assert "left out of train: cat, copy.jpg\ntest: cat, 003.jpg" in page
    assert "in two classes: one label is wrong (1)" in page


def test_or_it_stops_the_run(validated: Validate) -> None:
    code, report = validated(leak, leaks="stop")
    assert code == 2
    assert "no picture that is held out looks like one that is trained on" in report["error"]
    assert "name=validation/cat/003.jpg part=test class=cat" in report["error"]


def test_repetitions_and_contradictions_are_counted_and_named(validated: Validate) -> None:
    def repeat(root: Path) -> None:
        shutil.copy(root / "train/cat/001.jpg", root / "train/cat/same.jpg")
        shutil.copy(root / "validation/dog/002.jpg", root / "train/dog/held.jpg")
        shutil.copy(root / "train/cat/004.jpg", root / "train/dog/torn.jpg")

    code, report = validated(repeat, {"max_duplicate_ratio": 0.0})
    assert code == 2
    assert re.search("repeat another one, .*train/cat/same.jpg of=train/cat/001.jpg", report["error"])
    rows = data.files(images.load(validate.DATA))
    assert rows["train/dog/held.jpg"]["fate"] == "duplicate"
    assert rows["validation/dog/002.jpg"]["fate"] == "test"
    assert {rows[f"train/{name}"]["fate"] for name in ("cat/004.jpg", "dog/torn.jpg")} == {"conflict"}


@pytest.mark.parametrize("torn", ["files.parquet", "pairs.parquet", "meta.json"])
def test_torn_data_are_named(validated: Validate, torn: str) -> None:
    assert validated()[0] == 0
    (validate.DATA / torn).unlink()
    with pytest.raises(DataError, match="run "):
        validate.run(data.params("pictures"), {})  # type: ignore[arg-type]  # nothing is reported


def test_a_class_without_training_pictures_stops_the_run(validated: Validate) -> None:
    code, report = validated(lambda root: data.folder(root, {"validation/bird": 3}, first=400))
    assert code == 2
    assert re.search("every class has enough pictures to train on: .*class=bird", report["error"])


def test_dvc_runs_ingest_and_validate_for_the_classifier(clean: Path, tmp_path: Path) -> None:
    """In a checkout of its own, as a DAG run has it."""
    place = tmp_path / "checkout"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split():
        if name.startswith(("slipway/", "tasks/")) or name in ("dvc.yaml", "requirements.lock", "embedded"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
    images_params = "image_size: 32"
    (place / "params.yaml").write_text(
        f"workload: classifier\ningest: {{source: {clean}, images: {{{images_params}}}}}\nvalidate: {{max_psi: 0.2}}\n"
    )
    environment = os.environ | {
        "PYTHONPATH": str(place),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLIPWAY_HOME": str(tmp_path / "home"),
        "DVC_NO_ANALYTICS": "1",
    }
    for command in (["init", "-q", "--no-scm"], ["repro", "-q", "ingest", "validate"]):
        done = subprocess.run(
            ["dvc", *command], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert artifacts.read_json(place / "data/accepted.json")["source"] == str(clean)
    assert len(images.load(place / "data/ingest")) == 96
