"""The trained classifier as it leaves for the service: ONNX, calibration, golden inputs, its package's files."""

# B batch, S side
from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from slipway import artifacts, trained
from slipway.errors import ModelError
from slipway.package import TensorSpec
from slipway.workloads.base import Array, Tensors
from slipway.workloads.classifier import images
from slipway.workloads.classifier.augmentation import views
from slipway.workloads.classifier.graph import IMAGE, ClassifierGraph
from slipway.workloads.classifier.schema import ABOUT
from slipway.workloads.graph import Ranges

if TYPE_CHECKING:
    from slipway.workloads.classifier.model import Network, Served

Ints = npt.NDArray[np.int64]

CALIBRATION_BATCH = 32
GOLDEN = 4
REPLAYED_BYTES = 32 << 20  # most of the pictures that travel with a version
REPLAYED_MOST = 512 << 10  # of one of them: its request has to be within `serve.max_body_bytes`


class Export:
    """Makes everything that `compress` puts into a package from the data and the trained model."""

    served = ("probabilities",)
    """Outputs that an ordinary request fetches."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.data = images.load(data)
        weights, self.about = trained.read(folder, "classifier")
        self.weights = {name.removeprefix("network."): value for name, value in weights.items()}
        classes = len(self.weights["fc.bias"])
        self.side = int(self.about["image_size"])
        if tuple(self.about["classes"]) != self.data.classes or self.side != self.data.image_size:
            raise ModelError(f"{folder}: made from other data than {data}; run `python -m tasks.train`")
        self.inputs = (TensorSpec(IMAGE, "uint8", (None, self.side, self.side, 3)),)
        self.outputs = (
            TensorSpec("probabilities", "float32", (None, classes)),
            TensorSpec("logits", "float32", (None, classes)),
        )

    def fp32(self) -> bytes:
        """The model as ONNX in FP32."""
        return ClassifierGraph(self.weights, self.about).build()

    def probe(self) -> tuple[bytes, list[str]]:
        """The model with the least and largest value of every activation as outputs `range.NAME`, and the names."""
        made = ClassifierGraph(self.weights, self.about)
        return made.build(probe=True), [name.removeprefix("range.") for name in made.graph.probes]

    def int8(self, ranges: Ranges) -> bytes:
        """The model as ONNX in INT8, all of it."""
        return ClassifierGraph(self.weights, self.about, ranges).build()

    def network(self) -> Network:
        """The trained network in torch, for what goes on from it."""
        from slipway.workloads.classifier.model import network

        return network(self.weights, self.about)

    def module(self) -> Served:
        """The service's model in torch."""
        from slipway.workloads.classifier.model import Served

        return Served(self.network())

    def example(self) -> tuple[int, ...]:
        """Shape of an input of the network, with a batch of 2."""
        return (2, 3, self.side, self.side)

    def rounded(self) -> dict[str, str]:
        """Modules of the network whose outputs the INT8 graph rounds, and what it calls their ranges."""
        _, names = self.probe()
        return {module_of(name): name for name in names}

    def having(self, weights: Mapping[str, Array]) -> Export:
        """The same with other weights, whose layers may have fewer channels."""
        made = copy(self)
        made.weights = dict(weights)
        return made

    def calibration(self, count: int, seed: int) -> Iterator[Tensors]:
        """`count` training pictures drawn at random, as the service sees them."""
        at = np.random.default_rng([seed, 7]).permutation(self.data.of("train"))[:count]
        for begin in range(0, len(at), CALIBRATION_BATCH):
            yield {IMAGE: seen(self.data, at[begin : begin + CALIBRATION_BATCH])}

    def requests(self, batch: int, count: int, seed: int) -> list[Tensors]:
        """Inputs of `count` typical requests of `batch` pictures, to time an engine with."""
        rows = np.concatenate([tensors[IMAGE] for tensors in self.calibration(min(64, batch * count), seed)])
        return [{IMAGE: np.take(rows, range(at * batch, (at + 1) * batch), axis=0, mode="wrap")} for at in range(count)]

    def golden(self) -> Tensors:
        """Inputs that the served model must answer as it did when it was sealed."""
        return {IMAGE: seen(self.data, self.data.of("train")[:GOLDEN])}

    def files(self, folder: Path) -> None:
        """Write what the endpoint reads beside the model."""
        artifacts.write_json(folder / ABOUT, {key: self.about[key] for key in ("classes", "image_size", "stored_size")})


EXPORT = Export


def module_of(name: str) -> str:
    """Path of the module in the network whose output an activation of the graph is."""
    if name.endswith(".conv2.out"):
        return name.removesuffix("conv2.out") + "bn2"
    return name + ".1" if name.endswith(".downsample") else name


def seen(data: images.Images, at: Ints) -> npt.NDArray[np.uint8]:
    """What the network sees of pictures: [n, S, S, 3]."""
    return views(data.pixels(at), data.image_size)


def muddle(package: Path, random: Random) -> None:
    """Shuffle the names of the classes, to see a release refuse what only users can tell."""
    about = artifacts.read_json(package / ABOUT)
    random.shuffle(about["classes"])
    artifacts.write_json(package / ABOUT, about)


def replay(data: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Held-out test pictures as requests with their class: what a canary is fed with as live traffic."""
    held = images.load(data)
    made: list[dict[str, Any]] = []
    total = 0
    for at in np.random.default_rng([seed, 8]).permutation(held.of("test"))[:count].tolist():
        original = held.original(at)
        if len(original) > REPLAYED_MOST:
            continue
        total += len(original)
        if total > REPLAYED_BYTES:
            break
        request = {"image": base64.b64encode(original).decode()}
        made.append({"user": f"visitor-{at}", "request": request, "truth": held.classes[held.labels[at]]})
    return made
