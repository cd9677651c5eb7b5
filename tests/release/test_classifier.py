"""Releases of a classifier on the local stack: a good one is promoted, one that misnames its classes is rolled back."""

# B batch, H height, W width, C channels
from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from benchmarks.bad_candidate import permute
from slipway import artifacts, package, store, tracking
from slipway.errors import CanaryRejectedError
from slipway.package import TensorSpec
from slipway.params import Params
from slipway.serving import engines
from tests.conftest import needs
from tests.release.service import Service, brief, service

pytestmark = [
    pytest.mark.slow,
    needs("nginx", "redis-server", "prometheus"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow.*"),
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
COLOURS = ["red", "green", "blue"]
SIDE = 16


def seal(folder: Path, heat: float) -> Path:
    """A network that tells the colour that prevails; `heat` alone parts one version from another."""
    folder.mkdir(parents=True)
    constants = {"axes": np.array([1, 2]), "heat": np.array(heat, dtype=np.float32)}
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
        helper.make_node("Div", ["mean", "heat"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    given = [helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", SIDE, SIDE, 3])]
    names = ("probabilities", "logits")
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 3]) for name in names]
    held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "colours", given, made, held)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / package.MODEL
    )
    artifacts.write_json(folder / "classifier.json", {"classes": COLOURS, "image_size": SIDE, "stored_size": SIDE + 2})
    inputs = (TensorSpec("image", "uint8", (None, SIDE, SIDE, 3)),)
    outputs = tuple(TensorSpec(name, "float32", (None, 3)) for name in names)
    golden_BHWC = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)
    unverified = package.Package(folder, "classifier", "fp32", inputs, outputs)
    answers = engines.of(unverified, 1).run({"image": golden_BHWC}, list(names))
    golden = ({"image": golden_BHWC}, dict(zip(names, answers, strict=True)))
    package.seal(folder, "classifier", "fp32", inputs, outputs, golden)
    return folder


def pictures(path: Path, count: int = 90) -> Path:
    """Held-out photographs: noise in which one colour prevails."""
    draw = np.random.default_rng(1)
    with path.open("w") as out:
        for number in range(count):
            pixels = draw.integers(0, 120, (30, 40, 3), dtype=np.uint8)
            pixels[:, :, number % 3] += 100
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG")
            request = {"image": base64.b64encode(file.getvalue()).decode()}
            out.write(json.dumps({"user": f"u{number}", "request": request, "truth": COLOURS[number % 3]}) + "\n")
    return path


def of_pictures(params: Params) -> Params:
    return brief(params).model_copy(update={"workload": "classifier"})


def register(one: Service, name: str, sealed: Path) -> str:
    replay = pictures(one.folder / f"{name}.jsonl")
    replay = replay.rename(replay.with_name("replay.jsonl"))
    version = tracking.register("classifier", sealed, replay, store.start(name, {}), {})
    tracking.set_alias("classifier", "candidate", version)
    return version


def test_a_good_classifier_is_promoted_and_one_that_misnames_its_classes_is_rolled_back(tmp_path: Path) -> None:
    with service(tmp_path, of_pictures) as one:
        first = register(one, "first", seal(tmp_path / "first", 10.0))
        second = register(one, "second", seal(tmp_path / "second", 12.0))
        one.step("deploy", version=first)
        one.step("promote")
        one.step("deploy", version=second)
        assert all(step["verdict"] == "advance" for step in one.step("canary")["steps"])
        one.step("promote")
        assert tracking.aliases("classifier") == {"champion": second, "previous": first}

        muddled = seal(tmp_path / "muddled", 14.0)
        permute(muddled, seed=1)
        assert artifacts.read_json(muddled / "classifier.json")["classes"] != COLOURS
        bad = register(one, "muddled", muddled)
        one.step("deploy", version=bad)
        with pytest.raises(CanaryRejectedError, match="online metric"):
            one.step("canary")
        one.step("rollback")
        status = one.platform.status()
        assert (status.routing.champion, status.routing.canary) == (second, None)
        assert set(status.replicas) == {second}
