"""The classifier from the training loop to a package: it learns on two processes, goes on where it was, is scored."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from slipway import artifacts, package
from slipway.compression import engine
from slipway.errors import ModelError, RequestError
from slipway.params import TrainParams
from slipway.reporting import Chapter, Plot, write_html
from slipway.trained import WEIGHTS
from slipway.training import checkpoints, loop
from slipway.workloads.base import Array, Tensors
from slipway.workloads.classifier import images, scoring
from slipway.workloads.classifier.augmentation import view
from slipway.workloads.classifier.export import Export, muddle, replay
from slipway.workloads.classifier.params import AugmentParams, ClassifierParams
from slipway.workloads.classifier.schema import ClassifierEndpoint
from tests.classifier import data
from tests.conftest import ROOT

TINTS = {"blue": (40, 60, 200), "green": (60, 180, 70), "red": (210, 50, 60), "violet": (160, 60, 190)}
MODEL = ClassifierParams(width=8, blocks=(1, 1), repeats=2, augment=AugmentParams(mirror=True, mix=0.5))
TRAIN = TrainParams(epochs=3, batch_size=16, learning_rate=0.01, world_size=2, checkpoint_every_s=0.001)


@dataclass(frozen=True)
class Trained:
    """What the loop made of tinted pictures."""

    job: loop.Job
    state: loop.State
    data: images.Images
    package: Path
    full: bytes


def tinted(root: Path, count: int) -> Path:
    """Pictures whose class is a tint over blots of any colour."""
    for number, (name, tint) in enumerate(TINTS.items()):
        (root / name).mkdir(parents=True)
        for seed in range(number * count, (number + 1) * count):
            blots = np.asarray(data.picture(seed), np.float64)
            mixed = np.uint8(0.4 * blots + 0.6 * np.array(tint))
            Image.fromarray(mixed).save(root / name / f"{seed:04d}.jpg", quality=92)
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    place = tmp_path_factory.mktemp("classifier")
    source = tinted(place / "source", 50)
    ingested = data.read(data.params(source, image_size=16, near_bits=0), place / "data")
    job = loop.Job("classifier", ingested.folder, TRAIN, MODEL, place / "checkpoints", place / "trained")
    state = loop.train(job)
    export, folder = Export(ingested.folder, job.out), place / "package"
    folder.mkdir()
    export.files(folder)
    full = export.fp32()
    (folder / package.MODEL).write_bytes(full)
    names, golden = [spec.name for spec in export.outputs], dict(export.golden())
    answer = dict(zip(names, engine.load(full, "fp32")(names, golden), strict=True))
    package.seal(folder, "classifier", "fp32", export.inputs, export.outputs, (golden, answer))
    return Trained(job, state, ingested, folder, full)


def weights(folder: Path) -> dict[str, bytes]:
    with np.load(folder / WEIGHTS, allow_pickle=False) as stored:
        return {name: stored[name].tobytes() for name in stored.files}


def test_it_learns_on_two_processes_and_what_is_exported_scores_as_training_saw_it(trained: Trained) -> None:
    assert trained.state.best.metric > 0.8, trained.state.curve
    for split, off in (("validation", 1e-9), ("test", 0.3)):
        chosen = scoring.samples(trained.data.folder, split, 0, 0)
        values = scoring.score(engine.load(trained.full, "fp32"), chosen, trained.package)
        assert values["top1"].mean() == pytest.approx(trained.state.best.metric, abs=off)
        assert (values["top5"] >= values["top1"]).all()
        assert sum(mask.sum() for mask in scoring.slices(chosen).values()) == len(chosen)


def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_statistics(trained: Trained, tmp_path: Path) -> None:
    # The last checkpoint but one of the run is from the midst of its last epoch, where the statistics of ranks differ.
    newest = checkpoints.newest(trained.job.checkpoints)
    assert newest is not None
    shutil.copytree(trained.job.checkpoints, tmp_path / "checkpoints")
    again = loop.train(replace(trained.job, checkpoints=tmp_path / "checkpoints", out=tmp_path / "out"))
    assert again.curve[-1].metric == trained.state.curve[-1].metric
    assert weights(tmp_path / "out") == weights(trained.job.out)
    assert any("running_var" in name for name in weights(tmp_path / "out"))


def test_any_folder_is_scored_with_what_is_unknown_or_unusable_told(trained: Trained, tmp_path: Path) -> None:
    known = trained.data.classes[0]
    shown = data.folder(tmp_path / "shown" / "train", {known: 5, "a novelty": 3}, first=9000).parent
    (shown / "train" / known / "torn.jpg").write_bytes(b"\xff\xd8 no picture")
    (tmp_path / "params.yaml").write_text("workload: ranker\n")
    command = ["--model", str(trained.package), "--source", str(shown), "--json", "found.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLIPWAY_HOME": str(tmp_path / "home")}
    ended = subprocess.run(
        [sys.executable, "-m", "tasks.evaluate", *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["samples"] == 8
    assert found["left_out"]["fault"] == 1
    assert [(each["what"], each["examples"]) for each in found["unknown"]] == [("classes", ["a novelty"])]
    assert {row["name"]: row["count"] for row in found["slices"]} == {known: 5, "a novelty": 3}
    novelty = next(row for row in found["slices"] if row["name"] == "a novelty")
    assert novelty["fp32"]["value"] == 0, "what the model has never seen counts as missed"


def test_int8_keeps_the_answers_and_other_data_are_refused(trained: Trained, tmp_path: Path) -> None:
    export = Export(trained.data.folder, trained.job.out)
    probe, names = export.probe()
    ranges = engine.ranges(engine.load(probe, "probe"), names, list(export.calibration(64, 0)))
    requests = export.requests(4, 3, 0)
    assert [tensors["image"].shape for tensors in requests] == [(4, 16, 16, 3)] * 3
    runs = [engine.load(model, "model") for model in (trained.full, export.int8(ranges))]
    first, second = (np.concatenate([run(["probabilities"], each)[0] for each in requests]) for run in runs)
    assert np.abs(first - second).max() < 0.2
    shutil.copytree(trained.job.out, tmp_path / "trained")
    about = artifacts.read_json(tmp_path / "trained" / "model.json")
    artifacts.write_json(tmp_path / "trained" / "model.json", {**about, "classes": ["a", "b", "c", "d"]})
    with pytest.raises(ModelError, match="made from other data"):
        Export(trained.data.folder, tmp_path / "trained")


def test_the_endpoint_names_the_class_of_a_file_and_feedback_is_about_the_best_one(trained: Trained) -> None:
    endpoint, run = ClassifierEndpoint(trained.package), engine.load(trained.full, "fp32")
    hits = 0
    for sample in replay(trained.data.folder, 20, 0):
        query = endpoint.decode(json.dumps({**sample["request"], "k": 3}).encode())
        endpoint.check(query.inputs)
        outputs = run(list(endpoint.outputs), endpoint.collate([query, query]))
        answer = endpoint.encode(query, dict(zip(endpoint.outputs, [each[0] for each in outputs], strict=True)))
        assert len(answer["classes"]) == 3
        said = [each["probability"] for each in answer["classes"]]
        assert said == sorted(said, reverse=True)
        assert len(endpoint.shown(answer)) == 1
        hits += endpoint.shown(answer)[0] == sample["truth"]
    assert hits > 10


def test_the_endpoint_sees_a_file_exactly_as_the_evaluation_does(trained: Trained) -> None:
    endpoint, at = ClassifierEndpoint(trained.package), int(trained.data.of("test")[0])
    text = base64.b64encode(trained.data.original(at)).decode()
    for image in (text, f"data:image/jpeg;base64,{text}"):
        query = endpoint.decode(json.dumps({"image": image}).encode())
        seen = view(trained.data.pixels([at])[0], trained.data.image_size)
        assert (query.inputs["image"] == seen).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{}", "missing required field `image`"),
        (b'{"image": "!"}', "image: not valid base64"),
        (b'{"image": ""}', "image: the file is empty"),
        (b'{"image": "aGVsbG8="}', "image: no picture of a known format"),
        (b'{"image": "aGVsbG8=", "k": 0}', "k"),
        (b'{"image": "aGVsbG8=", "model": "other"}', "unknown field `model`"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(trained: Trained, body: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ClassifierEndpoint(trained.package).decode(body)


def test_a_bomb_is_refused_by_its_header(trained: Trained, tmp_path: Path) -> None:
    Image.new("1", (30_000, 1_000)).save(tmp_path / "bomb.png")
    body = json.dumps({"image": base64.b64encode((tmp_path / "bomb.png").read_bytes()).decode()}).encode()
    with pytest.raises(RequestError, match="30,000 × 1,000 pixels, over 16,000,000"):  # noqa: RUF001
        ClassifierEndpoint(trained.package).decode(body)


def test_a_muddled_package_and_one_of_other_classes_are_scored_by_name(trained: Trained, tmp_path: Path) -> None:
    run, chosen = engine.load(trained.full, "fp32"), scoring.samples(trained.data.folder, "test", 0, 0)
    own = scoring.score(run, chosen, trained.package)["top1"].mean()
    shutil.copytree(trained.package, tmp_path / "package")
    muddle(tmp_path / "package", Random(1))
    assert scoring.score(run, chosen, tmp_path / "package")["top1"].mean() < own
    about = artifacts.read_json(trained.package / "classifier.json")
    artifacts.write_json(tmp_path / "package/classifier.json", {**about, "classes": ["blue", "green", "red", "pink"]})
    (found,) = scoring.unknown(chosen, tmp_path / "package")
    assert (found.count, found.examples) == (1, ("violet",))
    values, violet = scoring.score(run, chosen, tmp_path / "package"), scoring.slices(chosen)["violet"]
    assert values["top1"][violet].sum() == 0
    assert values["probability"][violet].sum() == 0


def test_the_page_shows_the_confusion_and_the_worst_errors_as_pictures(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.package, tmp_path / "package")
    about = artifacts.read_json(tmp_path / "package/classifier.json")
    artifacts.write_json(tmp_path / "package/classifier.json", {**about, "classes": about["classes"][::-1]})
    chosen = scoring.samples(trained.data.folder, "test", 0, 0)
    run = engine.load(trained.full, "fp32")
    asked: list[int] = []

    def counted(names: Sequence[str] | None, inputs: Tensors) -> Sequence[Array]:
        asked.append(len(inputs["image"]))
        return run(names, inputs)

    values = scoring.score(run, chosen, tmp_path / "package")
    chapters = scoring.chapters(counted, chosen, tmp_path / "package", values)
    assert sum(asked) == (values["top1"] == 0).sum() > 0, "only what it got wrong is asked again"
    assert [chapter.title for chapter in chapters] == ["What it confuses", "Its worst errors"]
    assert all(isinstance(block, Plot) for chapter in chapters for block in chapter.blocks)
    write_html(tmp_path / "page.html", "Evaluation", "test", [], [Chapter("empty", []), *chapters])
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") > 3
    assert "violet" in page
    counts = scoring.confusion(np.array([0, 0, 1]), np.array([0, 2, 1]), 2, 3)
    assert counts.tolist() == [[1, 0, 1], [0, 1, 0]]
