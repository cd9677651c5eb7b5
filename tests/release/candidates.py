"""Tiny rankers for releases on a service of one's own: good ones, and one of each way to be bad.

All answer their golden inputs as promised, so nothing but live traffic finds the bad ones out.
"""

# B batch, T time, K items in an answer
from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.bad_candidate import permute
from slipway import artifacts, package
from slipway.serving import engines
from tests.serving import packages

KNOWN_ITEMS = 250
"""Items that the failing ranker has a vector for."""
SLOW_STEPS = 40_000
"""Turns of the slow ranker's loop, about 100 ms."""
HIT_RATIO = 0.6
"""Share of the samples whose true next item a good ranker has among its first ten."""


def good(folder: Path, scale: float = 1.0) -> Path:
    """A ranker; of two with different scales each has its own version, and both give the same items."""
    packages.seal(folder)
    model = onnx.load(folder / package.MODEL)
    _replace(model, "embedding", _initializer(model, "embedding") * np.float32(scale))
    return _reseal(folder, model, packages.ITEMS)


def failing(folder: Path) -> Path:
    """A ranker that breaks on the items that its golden inputs do not hold."""
    packages.seal(folder)
    model = onnx.load(folder / package.MODEL)
    _replace(model, "embedding", _initializer(model, "embedding")[: KNOWN_ITEMS + 1])
    return _reseal(folder, model, KNOWN_ITEMS)


def slow(folder: Path) -> Path:
    """A ranker that thinks for long before it answers."""
    packages.seal(folder)
    model = onnx.load(folder / package.MODEL)
    user = next(node for node in model.graph.node if "user" in node.output)
    user.output[0] = "quick"
    at = list(model.graph.node).index(user) + 1
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Abs", ["seconds"], ["later"])],
        "wait",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("seconds", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("later", TensorProto.FLOAT, None),
        ],
    )
    added = [
        helper.make_node("ReduceSum", ["quick"], ["start"], keepdims=0),
        helper.make_node("Loop", ["turns", "", "start"], ["waited"], body=body),
        helper.make_node("Mul", ["waited", "nothing"], ["zero"]),
        helper.make_node("Add", ["quick", "zero"], ["user"]),
    ]
    for offset, node in enumerate(added):
        model.graph.node.insert(at + offset, node)
    constants = {"turns": np.array(SLOW_STEPS), "nothing": np.array(0.0, dtype=np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return _reseal(folder, model, packages.ITEMS)


def useless(folder: Path) -> Path:
    """A ranker whose answers are other items than it means."""
    packages.seal(folder)
    permute(folder)
    return folder


def replay(path: Path, sealed: Path, count: int = 400, seed: int = 0) -> Path:
    """Write samples of users who mostly choose what this ranker would show them; those of known items come first."""
    draw = random.Random(seed)
    keys = artifacts.read_json(sealed / "items.json")["keys"]
    drawn = [draw.sample(range(1, len(keys) + 1), 8) for _ in range(count)]
    history_BT = np.array(sorted(drawn, key=lambda history: max(history) > KNOWN_ITEMS))
    (items_BK,) = engines.of(package.load(sealed), 1).run({"history": history_BT}, ["items"])
    with path.open("w") as out:
        for number, (past, best) in enumerate(zip(history_BT.tolist(), items_BK.tolist(), strict=True)):
            truth = best[draw.randrange(10)] if draw.random() < HIT_RATIO else best[-1]
            history = [keys[item - 1] for item in past]
            request = {"user": f"user{number}", "history": history, "k": 10}
            out.write(json.dumps({"user": f"user{number}", "request": request, "truth": keys[truth - 1]}) + "\n")
    return path


def _initializer(model: onnx.ModelProto, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.array(numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name)))


def _replace(model: onnx.ModelProto, name: str, value: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
    next(t for t in model.graph.initializer if t.name == name).CopyFrom(numpy_helper.from_array(value, name))


def _reseal(folder: Path, model: onnx.ModelProto, items: int) -> Path:
    """Save a changed model with golden outputs of its own, for histories of the first `items` items."""
    sealed = package.load(folder)
    onnx.save(model, folder / package.MODEL)
    inputs = {"history": np.random.default_rng(1).integers(1, items + 1, size=(4, 8))}
    golden = engines.of(sealed, 1).run(inputs, [spec.name for spec in sealed.outputs])
    named = {spec.name: array for spec, array in zip(sealed.outputs, golden, strict=True)}
    package.seal(folder, sealed.workload, sealed.precision, sealed.inputs, sealed.outputs, (inputs, named))
    return folder
