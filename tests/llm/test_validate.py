from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipway import artifacts, stage
from slipway.workloads.llm import corpus
from tasks import validate
from tests.llm import data


@pytest.fixture(scope="module", autouse=True)
def _great_expectations() -> None:
    """Import it once: its own imports warn of modules that Python deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import great_expectations  # noqa: F401


Validate = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Validate:
    """Ingest texts, harm the columns if wished, and run the stage: its exit code and report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path / "home"))

    def run(texts: list[str], harm: Callable[[Path], None] | None = None, **limits: Any) -> tuple[int, dict[str, Any]]:
        folder = tmp_path / "texts"
        for left in folder.glob("*"):
            left.unlink()
        folder.mkdir(exist_ok=True)
        for number, text in enumerate(texts):
            (folder / f"{number:04d}.txt").write_bytes(text.encode("latin-1"))
        params = data.params(folder, validate=limits)
        data.read(params, validate.DATA)
        if harm is not None:
            harm(validate.DATA)
        code = stage.call("validate", lambda report: validate.run(params, report))
        report: dict[str, Any] = artifacts.read_json(Path("reports/validate.json"))
        return code, report

    return run


def test_good_texts_are_accepted_and_others_are_held_against_them(validated: Validate) -> None:
    code, report = validated(data.texts())
    assert (code, report["verdict"], report["compared"]) == (0, "passed", False), report
    assert "nothing to compare with" in validate.PAGE.read_text()
    code, report = validated([text.upper() for text in data.texts()])
    assert (code, report["verdict"], report["compared"]) == (0, "warning", True)
    assert report["figures"]["psi"] > 0.2
    code, report = validated(data.texts()[:50])
    assert code == 2
    assert "volume_ratio" in report["error"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" ", "few texts are empty: .* name=0120.txt"),
        ("naïve", "few texts are not UTF-8: .* name=0120.txt"),
        (data.texts()[0], "few texts repeat an earlier one: .* name=0120.txt"),
    ],
)
def test_a_text_that_was_left_out_is_named(validated: Validate, text: str, message: str) -> None:
    code, report = validated([*data.texts(), text], max_duplicate_ratio=0.0)
    assert code == 2
    assert re.search(message, report["error"]), report["error"]


def test_a_text_that_leaked_into_training_is_found(validated: Validate) -> None:
    def harm(folder: Path) -> None:
        parts = corpus.load(folder).parts
        leaked, train = np.array(parts["test"].of(0)), np.array(parts["train"].tokens)
        offsets = np.array(parts["train"].offsets)
        train = np.concatenate([leaked, train[offsets[1] :]])
        offsets[1:] += len(leaked) - offsets[1]
        np.save(folder / "train.npy", train)
        np.save(folder / "train.offsets.npy", offsets)
        meta = artifacts.read_json(folder / "meta.json")
        meta["parts"]["train"]["tokens"] = len(train)
        artifacts.write_json(folder / "meta.json", meta)

    code, report = validated(data.texts(), harm)
    assert code == 2
    assert "no text that is held out is trained on" in report["error"]
    (broken,) = [finding for finding in report["findings"] if not finding["passed"]]
    assert [row["part"] for row in broken["rows"]] == ["test"]


def test_tokens_outside_of_the_vocabulary_are_counted(validated: Validate) -> None:
    def harm(folder: Path) -> None:
        tokens = np.load(folder / "test.npy")
        tokens[:7] = 60_000
        np.save(folder / "test.npy", tokens)

    code, report = validated(data.texts(), harm)
    assert code == 2
    assert report["figures"]["unknown_tokens"] == 7
