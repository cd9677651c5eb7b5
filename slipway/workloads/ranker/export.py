"""The trained ranker as it leaves for the service: ONNX, calibration samples, golden inputs, its package's files."""

# B batch, T time, U users
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from slipway import artifacts, trained
from slipway.errors import ModelError
from slipway.package import TensorSpec
from slipway.workloads.base import Tensors
from slipway.workloads.graph import Ranges
from slipway.workloads.ranker import sequences
from slipway.workloads.ranker.graph import OUTPUT, RankerGraph
from slipway.workloads.ranker.params import RankerParams
from slipway.workloads.ranker.sequences import padded

if TYPE_CHECKING:
    from slipway.workloads.ranker.model import Served

CALIBRATION_BATCH = 64
WIDE = 128  # inner layers narrower than this are no faster in INT8 (one thread, AVX512-VNNI): they stay FP32
GOLDEN_LENGTHS = (1, 3, 8)


class Export:
    """Makes everything that `compress` puts into a package from the data and the trained model."""

    inputs = (TensorSpec("history", "int64", (None, None)),)
    served = ("items", "scores")
    """Outputs that an ordinary request fetches."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.data = sequences.load(data)
        self.weights, about = trained.read(folder, "ranker")
        self.params = RankerParams.model_validate({k: about[k] for k in RankerParams.model_fields})
        if self.weights["item.weight"].shape != (self.data.item_count + 1, self.params.width):
            raise ModelError(f"{folder}: made from other data than {data}; run `python -m tasks.train`")
        shown = min(100, self.data.item_count)
        self.outputs = (
            TensorSpec("items", "int64", (None, shown)),
            TensorSpec("scores", "float32", (None, shown)),
            TensorSpec("logits", "float32", (None, self.data.item_count + 1)),
        )

    def fp32(self) -> bytes:
        """The model as ONNX in FP32."""
        return RankerGraph(self.weights, self.params).build()

    def probe(self) -> tuple[bytes, list[str]]:
        """The model with the least and largest input of every layer as outputs `range.LAYER`, and the layers."""
        graph = RankerGraph(self.weights, self.params)
        return graph.build(probe=True), [name.removeprefix("range.") for name in graph.graph.probes]

    def int8(self, ranges: Ranges) -> bytes:
        """The model as ONNX in INT8, where it pays: the item matrix always, the other layers when they are wide."""
        chosen = {name: ends for name, ends in ranges.items() if name == OUTPUT or self.params.width >= WIDE}
        return RankerGraph(self.weights, self.params, chosen).build()

    def module(self) -> Served:
        """The service's model in torch."""
        import torch

        from slipway.workloads.ranker.model import Ranker, Served

        made = Ranker(self.data.item_count, self.params)
        made.load_state_dict({name: torch.from_numpy(value) for name, value in self.weights.items()})
        return Served(made, self.outputs[0].shape[1] or 1)

    def calibration(self, count: int, seed: int) -> Iterator[Tensors]:
        """Histories of `count` users drawn at random, as the training saw them."""
        offsets = np.asarray(self.data.offsets)
        users = np.flatnonzero(np.diff(offsets) > 2)
        users = np.random.default_rng([seed, 7]).permutation(users)[:count]
        for at in range(0, len(users), CALIBRATION_BATCH):
            rows = users[at : at + CALIBRATION_BATCH]
            begin, end = offsets[rows], offsets[rows + 1] - 2
            yield {"history": padded(self.data.items, begin, end, self.params.max_length)}

    def requests(self, batch: int, count: int, seed: int) -> list[Tensors]:
        """Inputs of `count` typical requests of `batch` samples, to time an engine with."""
        found = list(self.calibration(batch * count, seed))
        rows = np.concatenate([self._wide(tensors["history"]) for tensors in found])
        made = [np.take(rows, range(at * batch, (at + 1) * batch), axis=0, mode="wrap") for at in range(count)]
        return [{"history": histories[:, (histories != 0).argmax(1).min() :]} for histories in made]

    def _wide(self, history: Any) -> Any:
        return np.pad(history, ((0, 0), (self.params.max_length - history.shape[1], 0)))

    def golden(self) -> Tensors:
        """Inputs that the served model must answer as it did when it was sealed."""
        top = min(self.data.item_count, max(GOLDEN_LENGTHS))
        rows = np.zeros((len(GOLDEN_LENGTHS), max(GOLDEN_LENGTHS)), np.int64)
        for row, length in zip(rows, GOLDEN_LENGTHS, strict=True):
            row[-length:] = np.arange(length) % top + 1
        return {"history": rows[:, -min(self.params.max_length, max(GOLDEN_LENGTHS)) :]}

    def files(self, folder: Path) -> None:
        """Write what the endpoint reads beside the model."""
        keys = self.data.item_keys
        artifacts.write_json(folder / "items.json", {"max_length": self.params.max_length, "keys": keys})


EXPORT = Export


def muddle(package: Path, random: Random) -> None:
    """Shuffle the names of the items, to see a release refuse what only users can tell."""
    names = artifacts.read_json(package / "items.json")
    random.shuffle(names["keys"])
    artifacts.write_json(package / "items.json", names)


def replay(data: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Held-out test samples as requests with the truth: what a canary is fed with as live traffic."""
    columns = sequences.load(data)
    users = np.random.default_rng([seed, 8]).permutation(np.flatnonzero(np.diff(columns.offsets) > 2))[:count]
    keys, names = columns.item_keys, columns.user_keys
    made = []
    for user in users:
        *history, truth = (keys[item - 1] for item in columns.of(user))
        name = names[user]
        made.append({"user": name, "request": {"user": name, "history": history, "k": 10}, "truth": truth})
    return made
