"""torch.compile as an engine: compiled by compress, sealed beside ONNX, and run where it is asked for by its name."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from slipway import package, trained
from slipway.compression import search
from slipway.errors import ModelError, ParamsError
from slipway.params import CompressParams, Params
from slipway.serving import engines, inductor
from slipway.stage import Report
from slipway.workloads.ranker.model import Ranker
from slipway.workloads.ranker.params import RankerParams
from tasks import compress
from tests.ranker import data
from tests.serving import bare, packages
from tests.serving.conftest import PARAMS, Replica

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
RANKER = RankerParams(width=16, blocks=1, max_length=12)
ITEMS = 300


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A workspace behind `compress`, which was asked for inductor."""
    folder = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SLIPWAY_HOME", str(folder / "home"))
        data.write(Path("data/ingest"), data.steps(users=200, items=ITEMS))
        torch.manual_seed(0)
        weights = {name: value.detach().numpy() for name, value in Ranker(ITEMS, RANKER).named_parameters()}
        trained.write(Path("models/trained"), "ranker", weights, RANKER.model_dump())
        report = Report("compress")
        compress.run(Params(model=RANKER, compress=CompressParams(engine="inductor")), report)
        report.save("done")
        yield folder


@pytest.fixture(scope="module")
def sealed(workspace: Path) -> package.Package:
    return package.load(workspace / "models/package")


@pytest.mark.slow
def test_what_was_compiled_is_measured_and_sealed_beside_onnx(workspace: Path, sealed: package.Package) -> None:
    found = json.loads((workspace / "reports/compress.json").read_text())
    assert [(form["recipe"], form["engine"]) for form in found["forms"]] == [("fp32", "inductor")]
    assert found["variants"]["fp32"]["latency_ms"].keys() == {"1", "8"}
    assert "none of the engines here (inductor) takes int8" in found["left_out"]["int8"]
    assert sealed.engine == "inductor"
    assert {package.MODEL, inductor.FILE} <= set(sealed.files)
    with zipfile.ZipFile(sealed.folder / inductor.FILE) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".pkl", ".pt"))]


@pytest.mark.slow
def test_it_answers_as_onnx_runtime_does_whatever_the_batch_and_the_length(sealed: package.Package) -> None:
    made = engines.of(sealed, 1, "inductor")
    engines.verify(made, sealed)
    reference = engines.make("onnxruntime", engines.Source(sealed.folder / package.MODEL, "model"))
    for shape in ((1, 1), (1, 7), (2, 2), (5, 12)):
        history = np.random.default_rng(0).integers(1, ITEMS + 1, shape)
        history.flags.writeable = False  # as arrays are that came over the network
        (ours,), (theirs,) = (each.run({"history": history}, ["logits"]) for each in (made, reference))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.slow
def test_its_code_runs_where_it_is_asked_for_and_nowhere_else(
    sealed: package.Package, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert engines.of(sealed, 1).name == "onnxruntime"
    assert "whose model is code" in caplog.text
    assert engines.of(sealed, 1, "inductor").name == "inductor"


@pytest.mark.slow
def test_a_replica_serves_it_where_torch_is_and_onnx_where_it_is_not(sealed: package.Package, tmp_path: Path) -> None:
    wanted = json.dumps({**PARAMS, "engine": "inductor"})
    with_torch = Replica(sealed.folder, tmp_path / "with", SLIPWAY_SERVE=wanted)
    without = Replica(
        sealed.folder,
        tmp_path / "without",
        options=bare.ALONE,
        PYTHONPATH=bare.make(tmp_path / "site"),
        SLIPWAY_SERVE=wanted,
    )
    try:
        for replica in (with_torch, without):
            replica.wait_until_ready()
        tensor = {"name": "history", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]}
        answers = [r.post("/v2/models/ranker/infer", {"inputs": [tensor]}).json for r in (with_torch, without)]
        items = [{output["name"]: output["data"] for output in each["outputs"]}["items"][:10] for each in answers]
        assert items[0] == items[1]
        assert "libtorch" in Path(f"/proc/{with_torch.process.pid}/maps").read_text()
        assert "inductor is not here" in without.log
    finally:
        with_torch.close()
        without.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value", "told"), [("torch", "1.0", "compiled by torch 1.0"), ("instructions", "avx9", "with avx9, which")]
)
def test_code_for_another_torch_or_processor_is_refused(
    sealed: package.Package, tmp_path: Path, key: str, value: str, told: str
) -> None:
    foreign = tmp_path / inductor.FILE
    with zipfile.ZipFile(sealed.folder / inductor.FILE) as given, zipfile.ZipFile(foreign, "w") as made:
        for info in given.infolist():
            content = given.read(info)
            if info.filename.endswith("metadata.json"):
                content = json.dumps({**json.loads(content), key: value}).encode()
            made.writestr(info, content)
    with pytest.raises(ModelError, match=told):
        engines.make("inductor", engines.Source(foreign, "foreign"))


def test_without_a_compiler_or_a_module_it_is_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "inductor" in search.usable("all")
    assert "inductor" not in search.usable("auto")
    with pytest.raises(ParamsError, match="the workload has no module to compile"):
        search.usable("inductor", compiles=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "inductor" not in search.usable("all")
    with pytest.raises(ParamsError, match=r"compress\.engine: .*apt-get install g\+\+; here are: auto, onnxruntime"):
        search.usable("inductor")


def test_a_package_that_was_not_sealed_for_it_is_served_by_its_own_engine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        made = engines.of(package.load(packages.seal(tmp_path / "package")), 1, "inductor")
    assert made.name == "onnxruntime"
    assert "has no model.pt2" in caplog.text
