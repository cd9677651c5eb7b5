"""How good an exported classifier is: held-out pictures, scores of each, a slice a class, and what it confuses.

A sample is a picture as the service would see it. Classes are matched by name, so that a model can be scored on data
that know other ones; a picture of a class that the model has never seen counts as missed.
"""

# U samples, B batch, C classes of the model, D classes of the data
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from slipway import artifacts
from slipway.workloads.base import Array, Tensors, Unknown
from slipway.workloads.classifier import images
from slipway.workloads.classifier.augmentation import views
from slipway.workloads.classifier.schema import ABOUT

if TYPE_CHECKING:
    from slipway.reporting import Chapter, Plot

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Run = Callable[[Sequence[str], Tensors], Sequence[Array]]

METRIC = "top1"
BATCH = 32
DEEP = 5  # top-5
WORST, ACROSS = 24, 6  # pictures that are shown as the worst errors, in rows of six
NEVER = -1  # class of a picture that the model does not know


@dataclass(frozen=True)
class Samples:
    """Held-out pictures: their positions in the data."""

    data: images.Images
    at: Ints
    """[U]"""
    seed: int

    def __len__(self) -> int:
        return len(self.at)

    @property
    def labels(self) -> Ints:
        """[U] as the data number their classes."""
        return self.data.labels[self.at]


def samples(data: Path, split: str, count: int, seed: int) -> Samples:
    """Draw held-out pictures: `count` at random, or all for 0; `split` is validation or test."""
    held = images.load(data)
    at = held.of(split)
    if count and count < len(at):
        at = np.sort(np.random.default_rng([seed, 4]).choice(at, count, replace=False))
    return Samples(held, at, seed)


def score(run: Run, chosen: Samples, package: Path, sampled: bool = True) -> dict[str, Floats]:
    """Score an exported model on each picture.

    Args:
        run: runs the model: names of outputs, inputs -> outputs.
        chosen: the pictures.
        package: folder with the model's classifier.json; its classes may differ from those of the data.
        sampled: of no account here.

    Returns:
        [U] each: top1, top5 (whether the true class is the best, or among the best five) and probability (of the true
        class).
    """
    probability_UC = probabilities(run, chosen, package)
    truth = translation(chosen.data, package)[chosen.labels]
    known = np.where(truth == NEVER, 0, truth)
    of_truth = np.take_along_axis(probability_UC, known[:, None], 1)
    ahead = np.where(truth == NEVER, len(probability_UC[0]), (probability_UC > of_truth).sum(1))
    return {
        "top1": (ahead < 1).astype(np.float64),
        "top5": (ahead < DEEP).astype(np.float64),
        "probability": np.where(truth == NEVER, 0.0, of_truth[:, 0]),
    }


def probabilities(run: Run, chosen: Samples, package: Path) -> Floats:
    """What a model says of each picture: [U, C]."""
    about = artifacts.read_json(package / ABOUT)
    found = []
    for begin in range(0, len(chosen), BATCH):
        shown = views(chosen.data.pixels(chosen.at[begin : begin + BATCH]), about["image_size"])
        found.append(run(["probabilities"], {"image": shown})[0].astype(np.float64))
    return np.concatenate(found) if found else np.empty((0, len(about["classes"])))


def translation(data: images.Images, package: Path) -> Ints:
    """Classes of the data -> classes of the package, NEVER where it has none of that name: [D]."""
    of = {name: at for at, name in enumerate(artifacts.read_json(package / ABOUT)["classes"])}
    return np.array([of.get(name, NEVER) for name in data.classes], dtype=np.int64)


def unknown(chosen: Samples, package: Path) -> list[Unknown]:
    """Classes of the data that the model of `package` has never seen."""
    missing = np.flatnonzero(translation(chosen.data, package) == NEVER)
    if not len(missing):
        return []
    names = chosen.data.classes
    return [Unknown("classes", len(missing), len(names), tuple(names[i] for i in missing[:5]))]


def figures(means: Mapping[str, float]) -> dict[str, float]:
    """Nothing beside the scores themselves."""
    return {}


def slices(chosen: Samples) -> dict[str, npt.NDArray[np.bool_]]:
    """Parts of the samples that are looked at alone, a class each: [U] masks."""
    return {name: chosen.labels == number for number, name in enumerate(chosen.data.classes)}


def examples(run: Run, chosen: Samples, package: Path, count: int = 8) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of pictures by name, what the model says of them, and what they are."""
    some = np.random.default_rng([chosen.seed, 6]).permutation(len(chosen))[:count]
    few = Samples(chosen.data, chosen.at[some], chosen.seed)
    classes, rows = artifacts.read_json(package / ABOUT)["classes"], []
    for at, label, said in zip(few.at, few.labels, probabilities(run, few, package), strict=True):
        truth, best = chosen.data.classes[label], np.argsort(-said)[:3]
        shown = [f"{'✓ ' if classes[i] == truth else ''}{classes[i]} {said[i]:.0%}" for i in best]
        rows.append([chosen.data.names[at], ", ".join(shown), truth])
    return ["picture", "shown (best 3)", "is"], rows


def chapters(run: Run, chosen: Samples, package: Path, scored: Mapping[str, Floats]) -> list[Chapter]:
    """What else the page of `evaluate` shows: which classes are taken for which, and the worst errors as pictures.

    Args:
        run: runs the model; it is asked again for the pictures that it got wrong, of the others the answer is known.
        chosen: the pictures.
        package: folder with the model's classifier.json.
        scored: what `score` gave for them.
    """
    from slipway.reporting import Chapter, Note

    classes, best = artifacts.read_json(package / ABOUT)["classes"], translation(chosen.data, package)[chosen.labels]
    wrong = Samples(chosen.data, chosen.at[scored["top1"] == 0], chosen.seed)
    said = probabilities(run, wrong, package)
    best[scored["top1"] == 0] = taken = said.argmax(1)
    worst = np.argsort(-said.max(1), kind="stable")[:WORST]
    errors = [_pictures(wrong, worst, [classes[i] for i in taken[worst]], said.max(1)[worst])] if len(worst) else []
    return [
        Chapter("What it confuses", [_confusion(chosen, best, classes)]),
        Chapter("Its worst errors", errors or [Note("It made none on the test pictures.", "passed")]),
    ]


def confusion(labels: Ints, best: Ints, known: int, classes: int) -> Ints:
    """How often a picture of each class was taken for each: [D, C] counts, from [U] and [U]."""
    return np.bincount(labels * classes + best, minlength=known * classes).reshape(known, classes)


def _confusion(chosen: Samples, best: Ints, classes: Sequence[str]) -> Plot:
    from slipway.reporting import Plot, canvas

    names = chosen.data.classes
    counts = confusion(chosen.labels, best, len(names), len(classes))
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    figure, axes = canvas("taken for", "is", height=max(2.4, 1.4 + 0.3 * len(names)))
    axes.grid(visible=False)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(classes)), classes, rotation=40, ha="right")
    axes.set_yticks(range(len(names)), names)
    for row, column in zip(*np.nonzero(counts), strict=True):
        dark = "#ffffff" if shares[row, column] > 0.5 else "#101418"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=dark)
    return Plot("test pictures of each class, and what they were taken for; a row's shade is its share", figure)


def _pictures(chosen: Samples, rows: Ints, taken: Sequence[str], sure: Floats) -> Plot:
    from matplotlib.figure import Figure

    from slipway.reporting import Plot

    height = -(-len(rows) // ACROSS)
    figure = Figure(figsize=(6, 1.35 * height), layout="constrained")
    for place, (row, name, probability) in enumerate(zip(rows, taken, sure, strict=True)):
        axes = figure.add_subplot(height, ACROSS, place + 1)
        axes.imshow(chosen.data.pixels(chosen.at[row : row + 1])[0])
        axes.set_axis_off()
        axes.set_title(f"{chosen.data.classes[chosen.labels[row]]}\n→ {name} {probability:.0%}", fontsize=6)
    return Plot("what each is → what it was taken for, and how sure the model was; the surest first", figure)
