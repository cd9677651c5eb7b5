"""A tiny ranker as a sealed package: an item's score is its mean similarity to the items of the history."""

# B batch, T time, I items, D width, K answer
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from slipway import package
from slipway.package import TensorSpec
from slipway.serving import engines, scores
from slipway.workloads.base import Query
from slipway.workloads.ranker.schema import RankerEndpoint

ITEMS, MAX_LENGTH, WIDTH = 300, 20, 16
INPUTS = (TensorSpec("history", "int64", (None, None)),)


def key(item: int) -> str:
    """Key of an item id."""
    return f"item{item}"


def seal(folder: Path, items: int = ITEMS, width: int = WIDTH, seed: int = 0, prefix: str = "item") -> Path:
    """Write a package of the ranker's signature; scores are the same whatever the padding."""
    folder.mkdir(parents=True, exist_ok=True)
    top = min(100, items)
    embedding_ID = np.random.default_rng(seed).normal(size=(items + 1, width)).astype(np.float32)
    embedding_ID[0] = 0
    onnx.save(_model(embedding_ID, top), folder / package.MODEL)
    names = {"max_length": MAX_LENGTH, "keys": [f"{prefix}{i}" for i in range(1, items + 1)]}
    (folder / "items.json").write_text(json.dumps(names))
    outputs = (
        TensorSpec("items", "int64", (None, top)),
        TensorSpec("scores", "float32", (None, top)),
        TensorSpec("logits", "float32", (None, items + 1)),
    )
    history_BT = np.random.default_rng(seed + 1).integers(1, items + 1, size=(8, min(10, MAX_LENGTH)))
    unverified = package.Package(folder, "ranker", "fp32", INPUTS, outputs)
    engine = engines.of(unverified, 1)
    golden = engine.run({"history": history_BT}, [spec.name for spec in outputs])
    named = {spec.name: array for spec, array in zip(outputs, golden, strict=True)}
    # Such as tests/platforms/stand.py sends: those do not drift.
    pairs = [(n % 200 + 1, n % 90 + 2) for n in range(200)]
    queries = [Query({"history": np.array([min(item, items) for item in pair])}, {}) for pair in pairs]
    deciles = scores.deciles(RankerEndpoint(folder), lambda names, feed: engine.run(feed, list(names)), queries)
    checked = ({"history": history_BT}, named)
    package.seal(folder, "ranker", "fp32", INPUTS, outputs, checked, score_deciles=deciles)
    return folder


def _model(embedding_ID: np.ndarray[tuple[int, int], np.dtype[np.float32]], top: int) -> onnx.ModelProto:
    constants = {
        "embedding": embedding_ID,
        "transposed": embedding_ID.T.copy(),
        "axis": np.array([1]),
        "top": np.array([top]),
        "worst": np.array(-np.inf, dtype=np.float32),
        "padding": np.array([[0]]),
        "items_and_padding": np.array(len(embedding_ID)),
        "hot": np.array([0.0, 1.0], dtype=np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["embedding", "history"], ["seen"]),
        helper.make_node("ReduceSum", ["seen", "axis"], ["user"], keepdims=0),
        helper.make_node("MatMul", ["user", "transposed"], ["raw"]),
        # What is in the history, and the padding, which is 0 there or added here, must not be recommended.
        helper.make_node("Shape", ["history"], ["batch"], start=0, end=1),
        helper.make_node("Concat", ["batch", "axis"], ["column"], axis=0),
        helper.make_node("Expand", ["padding", "column"], ["paddings"]),
        helper.make_node("Concat", ["history", "paddings"], ["excluded"], axis=1),
        helper.make_node("OneHot", ["excluded", "items_and_padding", "hot"], ["marks"]),
        helper.make_node("ReduceMax", ["marks", "axis"], ["marked"], keepdims=0),
        helper.make_node("Cast", ["marked"], ["mask"], to=TensorProto.BOOL),
        helper.make_node("Where", ["mask", "worst", "raw"], ["logits"]),
        helper.make_node("TopK", ["logits", "top"], ["scores", "items"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny_ranker",
        [helper.make_tensor_value_info("history", TensorProto.INT64, ["B", "T"])],
        [
            helper.make_tensor_value_info("items", TensorProto.INT64, ["B", top]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", top]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", len(embedding_ID)]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model
