"""Recipes that train: rounding networks, fewer channels, a teacher; and all of it through the training loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from slipway import trained
from slipway.compression import build, distill, engine, prune, qat, recipes
from slipway.compression.compiled import Torch
from slipway.compression.finetune import Tuner
from slipway.params import CompressParams, LoaderParams, Params, TrainParams
from slipway.workloads.classifier.export import Export
from slipway.workloads.classifier.model import Network, Training, normalised
from slipway.workloads.classifier.params import ClassifierParams
from slipway.workloads.classifier.training import ClassifierTask
from tests.classifier import data

SHAPE = ClassifierParams(width=32, blocks=(1, 1), repeats=1)
TRAIN = TrainParams(batch_size=16, loader=LoaderParams(workers=0))


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    data.folder(root / "source", {f"{part}/{name}": 16 for part in ("train", "validation") for name in ("cat", "dog")})
    data.read(data.params(root / "source"), root / "ingest")
    return root / "ingest"


@pytest.fixture(scope="module")
def export(ingested: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The export of a network that was never trained, whose blocks are more than the identity."""
    torch.manual_seed(0)
    task = ClassifierTask(ingested, TRAIN, SHAPE)
    model = task.model()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    folder = tmp_path_factory.mktemp("trained")
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    trained.write(folder, "classifier", weights, task.about())
    return Export(ingested, folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_network_that_learned_to_round_answers_in_the_engines_as_in_torch(export: Export) -> None:
    torch.manual_seed(0)
    places = export.rounded()
    prepared = qat.prepare(export.network(), torch.randn(export.example()), places)
    rounding = qat.rounding(prepared, places)
    training = Training(prepared, 0.0).train()  # type: ignore[arg-type]  # another network in its place
    optimizer = torch.optim.AdamW(training.parameters(), lr=1e-3)
    for count in (8, 5, 8, 8):
        image = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8)
        label = torch.randint(0, 2, (count,))
        training(image, label, label, torch.ones(count)).backward()
        optimizer.step()
        optimizer.zero_grad()
    training.eval()
    image = torch.randint(0, 256, (32, 32, 32, 3), dtype=torch.uint8)
    weights = {name: value.detach().numpy() for name, value in prepared.state_dict().items()}
    ranges = qat.ranges(weights, rounding)
    assert set(ranges) == set(places.values())
    model = export.having(weights).int8(ranges)
    with torch.no_grad():
        reference = prepared(normalised(image)).numpy()
    for name in ("onnxruntime", "openvino"):
        (answer,) = engine.load(model, "qat", on=name)(["logits"], {"image": image.numpy()})
        assert np.abs(answer - reference).mean() < 0.1 * reference.std()
        assert (answer.argmax(1) == reference.argmax(1)).mean() > 0.9


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_channels_that_depend_on_one_another_go_together(share: float) -> None:
    network = Network(10, 32, 64, (2, 1))
    before = sum(p.numel() for p in network.parameters())
    sizes = []
    for _ in prune.prune(network, torch.randn(2, 3, 32, 32), share):
        network(torch.randn(2, 3, 32, 32)).sum().backward()  # it can be trained after each step
        sizes.append(sum(p.numel() for p in network.parameters()))
    assert len(sizes) == prune.steps(share)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < (1 - share) ** 2 * before * 1.1
    assert network.fc.out_features == 10
    kept = {module.out_channels for module in network.modules() if isinstance(module, nn.Conv2d)}
    assert kept == {round(64 * (1 - share)), round(128 * (1 - share))}
    assert network(torch.randn(3, 3, 32, 32)).shape == (3, 10)


def test_a_teacher_is_neither_trained_nor_saved_and_its_share_of_the_loss_vanishes_with_the_difference() -> None:
    torch.manual_seed(0)
    student, teacher = (Training(Network(4, 32, 16, (1,)), 0.0) for _ in range(2))
    taught = distill.Taught(student, teacher.network)
    assert {name.split(".", 1)[0] for name, _ in taught.named_parameters()} == {"student"}
    image, label = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8), torch.randint(0, 4, (6,))
    batch = {"image_BHWC": image, "label_B": label, "other_B": label, "share_B": torch.ones(6)}
    taught.train()
    assert taught(**batch).item() != pytest.approx(student(**batch).item())
    assert not any(p.requires_grad for p in teacher.network.parameters())
    taught.eval()
    assert taught(**batch).item() == pytest.approx(student(**batch).item())
    logits = torch.randn(5, 7)
    assert distill.apart(logits, logits + 3.0, 2.0).item() == pytest.approx(0.0, abs=1e-6)
    assert distill.apart(logits, torch.randn(5, 7), 2.0).item() > 0


@pytest.mark.slow
def test_a_recipe_goes_through_the_training_loop_once_and_leaves_a_smaller_model_that_runs(
    export: Export, ingested: Path, tmp_path: Path
) -> None:
    params = Params(
        workload="classifier", train=TRAIN, model=SHAPE, compress=CompressParams(finetune_epochs=1, finetune_rate=1.0)
    )
    tuner = Tuner(params, ingested, tmp_path / "work")
    recipe = recipes.parse("distill-25-qat")
    model = build.build(recipe, export, tuner, 16, 0)
    assert len(model) < 0.3 * len(export.fp32())
    inputs = export.requests(4, 1, 0)[0]
    (answer,) = engine.load(model, "model")(["probabilities"], inputs)
    assert np.allclose(answer.sum(1), 1, atol=1e-3)
    stages = sorted(path.parent.name for path in tuner.work.glob("*/model.json"))
    assert stages == ["distill-25-qat.rounding", "distill-25.1"]
    written = [path.stat().st_mtime_ns for path in tuner.work.glob("*/model.json")]
    assert build.build(recipe, export, tuner, 16, 0) == model  # a search that was killed finds what it trained
    assert written == [path.stat().st_mtime_ns for path in tuner.work.glob("*/model.json")]


def test_torch_is_an_engine_that_answers_as_onnx_runtime_does(export: Export) -> None:
    inputs = export.requests(3, 1, 0)[0]
    names = ["probabilities", "logits"]
    ours = Torch(export.module()).run(inputs, names)
    for mine, theirs in zip(ours, engine.load(export.fp32(), "fp32")(names, inputs), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-3)
