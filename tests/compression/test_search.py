"""The search on a real, small ranker: recipes, engines, the front, the choice, the page, and what evaluate makes."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slipway import artifacts, config, package, trained
from slipway.compression import gate, memory, pareto, recipes, search
from slipway.compression.pareto import Variant
from slipway.errors import ModelError, ParamsError
from slipway.params import CompressParams, Params
from slipway.serving import engines
from slipway.stage import Report
from slipway.workloads.ranker.model import Ranker
from slipway.workloads.ranker.params import RankerParams
from tasks import compress, evaluate
from tests.conftest import ROOT
from tests.ranker import data

RANKER = RankerParams(width=128, blocks=1, max_length=12)
COMPRESS = CompressParams(max_drop=0.05, min_overlap=0.5, min_speedup=0.01)
PARAMS = Params(model=RANKER, compress=COMPRESS)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A workspace behind `train`, compressed; the model knows its rule because its weights were made so."""
    folder = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SLIPWAY_HOME", str(folder / "home"))
        data.write(Path("data/ingest"), data.steps(users=600, items=300))
        torch.manual_seed(0)
        model = Ranker(300, RANKER)
        weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
        trained.write(Path("models/trained"), "ranker", weights, RANKER.model_dump())
        report = Report("compress")
        compress.run(PARAMS, report)
        report.save("done")
        yield folder


@pytest.fixture(scope="module")
def found(workspace: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((workspace / "reports/compress.json").read_text())
    return values


def test_every_recipe_is_measured_in_its_fastest_engine(found: dict[str, Any]) -> None:
    assert list(found["variants"]) == ["fp32", "int8", "bf16"]
    timed = {(form["recipe"], form["engine"]) for form in found["forms"]}
    assert timed == {
        *(("fp32", name) for name in ("onnxruntime", "openvino")),
        *(("int8", name) for name in ("onnxruntime", "openvino")),
        ("bf16", "openvino"),
    }
    for each in found["variants"].values():
        assert set(each["latency_ms"]) == {"1", "8"}
        assert 20e6 < each["added_bytes"] + 20e6 < each["peak_bytes"] < 1e9
        assert 0 <= each["metric"] <= 1
    assert found["variants"]["int8"]["size_bytes"] < 0.5 * found["variants"]["fp32"]["size_bytes"]
    assert found["variants"]["int8"]["quality"]["overlap"] > 0.5
    assert found["front"]


def test_the_package_names_recipe_and_engine_and_gives_its_golden_answers(
    workspace: Path, found: dict[str, Any]
) -> None:
    sealed = package.load(workspace / "models/package")
    assert sealed.recipe == found["choice"]["recipe"]
    assert len(sealed.score_deciles) == 9
    assert sealed.engine == found["variants"][sealed.recipe]["engine"]
    engines.verify(engines.of(sealed, 1), sealed)
    assert {path.name for path in (workspace / "models/export").iterdir()} == {"fp32.onnx", "int8.onnx", "bf16.onnx"}


def test_the_page_shows_every_variant_and_each_has_its_plots(workspace: Path, found: dict[str, Any]) -> None:
    text = (workspace / "reports/compress.html").read_text()
    assert all(name in text for name in found["variants"])
    assert "history over 5" in text
    plots = {path.name for path in (workspace / "reports/compress").iterdir()}
    assert plots == {"fp32.pareto.png", *(f"{n}.{kind}.png" for n in ("int8", "bf16") for kind in ("pareto", "losses"))}


def test_evaluate_scores_what_is_served_in_its_engine(workspace: Path, found: dict[str, Any]) -> None:
    report = Report("evaluate", workspace / "reports")
    evaluate.run(PARAMS, report)
    assert report["served"] == found["choice"]["recipe"]
    assert set(report["metrics"]) == {"fp32", report["served"]}


def test_a_package_whose_engine_is_absent_is_served_by_onnx_runtime_which_is_logged(
    workspace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "package"
    shutil.copytree(workspace / "models/package", folder)
    manifest = artifacts.read_json(folder / package.MANIFEST)
    artifacts.write_json(folder / package.MANIFEST, {**manifest, "engine": "tensorrt"})
    with caplog.at_level(logging.WARNING):
        made = engines.of(package.load(folder), 1)
    assert made.name == "onnxruntime"
    assert "tensorrt is not here" in caplog.text
    engines.verify(made, package.load(folder))
    del manifest["engine"], manifest["recipe"]  # as packages were before there was a choice
    artifacts.write_json(folder / package.MANIFEST, manifest)
    old = package.load(folder)
    assert (old.engine, old.recipe) == ("onnxruntime", old.precision)


@pytest.mark.parametrize(("name", "remedy"), [("tensorrt", "onnxruntime-gpu"), ("npu", "NPU"), ("cuda", "NVIDIA")])
def test_an_engine_that_is_asked_for_and_absent_is_refused_with_what_to_do(name: str, remedy: str) -> None:
    with pytest.raises(
        ParamsError, match=f"compress.engine: {name} is not here .*{remedy}.*here are: auto, onnxruntime"
    ):
        search.usable(name)
    assert search.usable("openvino") == ["openvino"]


def test_both_engines_give_the_same_answers(workspace: Path) -> None:
    model = (workspace / "models/export/fp32.onnx").read_bytes()
    history = {"history": np.arange(1, 25).reshape(4, 6)}
    made = [engines.make(name, engines.Source(model, name)) for name in ("onnxruntime", "openvino")]
    (items, logits), (other_items, other_logits) = (engine.run(history, ["items", "logits"]) for engine in made)
    assert items.dtype == other_items.dtype == np.int64
    np.testing.assert_allclose(logits, other_logits, atol=1e-4)
    assert search.overlap(items[:, :10], other_items[:, :10]) > 0.9
    with pytest.raises(ModelError, match=r"torn\.onnx: OpenVINO cannot load it"):
        engines.make("openvino", engines.Source(b"torn", "torn.onnx"))


def test_a_signal_still_finds_its_handler_after_engines_came_and_went(workspace: Path) -> None:
    """OpenVINO puts a signal stack under the thread; one that is gone would end the process at the next Ctrl-C."""
    program = f"""
import faulthandler, signal
from pathlib import Path
from slipway.serving import engines
faulthandler.enable()  # has a signal stack of its own, as pytest does
caught = []
signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
model = Path({str(workspace / "models/export/fp32.onnx")!r}).read_bytes()
source = {{precision: engines.Source(model, "model", precision, 1) for precision in ("fp32", "bf16")}}
here = [engines.make("openvino", each) for each in source.values()]
while here:
    here.pop(0)  # the first goes first
    signal.raise_signal(signal.SIGTERM)
assert len(caught) == 2
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"ended with {ended.returncode}: {ended.stderr}"


def test_a_model_that_fails_in_its_own_process_is_told(workspace: Path) -> None:
    with pytest.raises(ModelError, match="its process failed"):
        memory.measure(b"torn", "onnxruntime", "fp32", {"history": np.ones((1, 2), np.int64)})


def variant(recipe: str, metric: float, ms: float, size: int, drop: float | None = None) -> Variant:
    quality = None
    if drop is not None:
        reasons = ("loses too much",) if drop > 0.02 else ()
        quality = gate.Quality(gate.Drop(1000, drop, drop, drop, "kept"), reasons=reasons)
    gain = {1: 10 / ms, 8: 10 / ms}
    return Variant(recipe, "fp32", "onnxruntime", metric, {1: ms, 8: ms}, size, size, size, gain, gain, quality)


FULL = variant("fp32", 0.80, 10.0, 100)
FOUND = [
    FULL,
    variant("int8", 0.799, 4.0, 25, 0.001),
    variant("prune-50", 0.795, 5.0, 30, 0.006),
    variant("prune-70", 0.7, 2.0, 9, 0.12),
    variant("bf16", 0.80, 10.2, 100, 0.0),
]


def test_the_front_holds_what_nothing_beats_in_everything() -> None:
    assert pareto.front(FOUND) == ["fp32", "int8", "prune-70"]
    assert pareto.front([FULL, replace(FULL, recipe="same")]) == ["fp32", "same"]


def test_the_fastest_that_passes_is_chosen_and_the_others_have_their_reasons() -> None:
    choice = pareto.choose(FOUND, 1.05)
    assert choice.recipe == "int8"
    assert set(choice.refused) == {"prune-50", "prune-70", "bf16"}
    assert choice.refused["prune-70"] == "loses too much"
    assert "slower than int8" in choice.refused["prune-50"]
    assert "compress.min_speedup asks for 1.05x" in choice.refused["bf16"]
    assert pareto.choose(FOUND, 3.0).recipe == "fp32"
    assert pareto.choose([FULL], 1.05).reason == "no recipe was tried"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qat", recipes.Recipe("qat", trained=True, precision="int8")),
        ("tuned-int8", recipes.Recipe("tuned-int8", tuned=True, precision="int8")),
        ("prune-30", recipes.Recipe("prune-30", share=0.3)),
        ("distill-50-int8", recipes.Recipe("distill-50-int8", 0.5, taught=True, precision="int8")),
        ("prune-95-qat", recipes.Recipe("prune-95-qat", 0.95, trained=True, precision="int8")),
        ("bf16", recipes.Recipe("bf16", precision="bf16")),
    ],
)
def test_a_name_tells_all_of_a_recipe(name: str, expected: recipes.Recipe) -> None:
    assert CompressParams(recipes=(name,)).recipes == (name,)
    assert recipes.parse(name) == expected


@pytest.mark.parametrize(
    "name", ["prune", "prune-99", "int4", "qat-int8", "prune-30-bf16", "bf16-qat", "tuned-qat", ""]
)
def test_what_is_no_recipe_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="recipes"):
        CompressParams(recipes=(name,))


def test_a_recipe_that_the_workload_has_not_is_refused_with_those_it_has() -> None:
    raw = config._read(ROOT / "params.yaml")
    with pytest.raises(ParamsError, match="workload ranker offers no prune-30; it has: int8, bf16"):
        config.parse({**raw, "compress": {"recipes": ["int8", "prune-30"]}})
    assert config.parse({**raw, "compress": {"recipes": []}}).compress.recipes == ()
