"""The ranker as an ONNX graph, in FP32 or INT8, made from its weights.

It answers for the last place of a history alone, so the last block computes one query a history. The item matrix is
stored once and serves both as the embedding and as the output layer: in INT8 it is a quarter of the size, symmetric,
with one scale an item, and the output layer is one integer matrix product. The first output lists the best items.

    history int64 [B, T]  ->  items int64 [B, K], scores float32 [B, K], logits float32 [B, I+1]
"""

# B batch, T time, D width, I items, K shown
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from slipway.workloads.base import Array
from slipway.workloads.ranker.params import RankerParams

OPSET = 18
SHOWN = 100
HIDDEN = np.float32(-1e9)
OUTPUT = "item"  # name of the output layer among the linear layers

Ranges = Mapping[str, tuple[float, float]]


class Graph:
    """Collects nodes and constants; every method gives the name of what it computes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Add a node; with several outputs, their names are the first one's with .1, .2 … behind."""
        name = f"{kind}{len(self.nodes)}"
        names = [name, *(f"{name}.{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return name

    def constant(self, value: Any, name: str | None = None) -> str:
        """Add a constant, or find it by its name."""
        name = name or f"constant{len(self.constants)}"
        self.constants.setdefault(name, np.ascontiguousarray(value))
        return name

    def ints(self, *values: int) -> str:
        """Add a constant vector of int64."""
        return self.constant(np.array(values, np.int64), "ints" + "_".join(map(str, values)))

    def model(self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> bytes:
        """Check and serialise the graph."""
        constants = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, "ranker", inputs, outputs, constants)
        opsets = [helper.make_opsetid("", OPSET)]
        made = helper.make_model(graph, opset_imports=opsets, ir_version=9, producer_name="slipway")
        onnx.checker.check_model(made)
        data: bytes = made.SerializeToString()
        return data


class RankerGraph:
    """Builds the graph; with `ranges` of a layer's inputs, that layer is INT8."""

    def __init__(self, weights: Mapping[str, Array], params: RankerParams, ranges: Ranges | None = None) -> None:
        self.graph, self.weights, self.params = Graph(), weights, params
        self.ranges = ranges or {}
        self.probes: list[str] = []

    def build(self, probe: bool = False) -> bytes:
        """Serialise the model; `probe` adds least and largest input of every linear layer as `range.LAYER`: [2]."""
        g, items = self.graph, self.weights["item.weight"].shape[0] - 1
        state = self._encode(probe)
        logits = self._linear(state, OUTPUT, self.weights["item.weight"], None, probe)
        g.op("Identity", logits)
        g.nodes[-1].output[0] = "logits"
        self._best(items)
        shown = min(SHOWN, items)
        outputs = [
            helper.make_tensor_value_info("items", TensorProto.INT64, ["B", shown]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", shown]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", items + 1]),
        ]
        outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in self.probes]
        return g.model([helper.make_tensor_value_info("history", TensorProto.INT64, ["B", "T"])], outputs)

    def _encode(self, probe: bool) -> str:
        """State after the last item: [B, D]."""
        g, params = self.graph, self.params
        time = g.op("Gather", g.op("Shape", "history"), g.ints(1))
        longest = g.ints(params.max_length)
        places = g.constant(self.weights["place.weight"][::-1], "places")
        place = g.op("Slice", places, g.op("Sub", longest, time), longest, g.ints(0))
        x = g.op("Add", self._embed(), place)
        padding = g.op("Cast", g.op("Equal", "history", g.constant(np.int64(0), "zero")), to=TensorProto.FLOAT)
        hidden = g.constant(HIDDEN, "hidden")
        keys = g.op("Unsqueeze", g.op("Mul", padding, hidden), g.ints(1, 2))  # [B, 1, 1, T]
        future = np.triu(np.full((params.max_length, params.max_length), HIDDEN, np.float32), 1)
        rows = g.op(
            "Slice", g.constant(future, "future"), g.ints(0, 0), g.op("Concat", time, time, axis=0), g.ints(0, 1)
        )
        mask = g.op("Add", keys, rows)
        for block in range(params.blocks):
            last = block == params.blocks - 1
            x = self._block(x, f"blocks.{block}.", keys if last else mask, last, probe)
        return self._norm(g.op("Squeeze", x, g.ints(1)), "norm")

    def _embed(self) -> str:
        g, table = self.graph, self.weights["item.weight"]
        if OUTPUT not in self.ranges:
            return g.op("Gather", g.constant(table, "item.weight"), "history")
        whole, scale = quantized(table)
        rows = g.op("Cast", g.op("Gather", g.constant(whole, "item.weight"), "history"), to=TensorProto.FLOAT)
        scales = g.op("Gather", g.constant(scale, "item.scale"), "history")
        return g.op("Mul", rows, g.op("Unsqueeze", scales, g.ints(-1)))

    def _block(self, x: str, name: str, mask: str, last: bool, probe: bool) -> str:
        g, width, heads = self.graph, self.params.width, self.params.heads
        weight, bias = self.weights[name + "qkv.weight"], self.weights[name + "qkv.bias"]
        around = self._norm(x, name + "attention_norm")
        asking, x = (self._tail(around), self._tail(x)) if last else (around, x)
        query = self._linear(asking, name + "query", weight[:width], bias[:width], probe)
        both = self._linear(around, name + "key_value", weight[width:], bias[width:], probe)
        key = g.op("Split", both, outputs=2, axis=-1, num_outputs=2)
        split = [self._heads(part, order) for part, order in ((query, "q"), (key, "k"), (f"{key}.1", "v"))]
        scale = g.constant(np.float32(1 / math.sqrt(width // heads)), "scale")
        attention = g.op("Softmax", g.op("Add", g.op("Mul", g.op("MatMul", split[0], split[1]), scale), mask), axis=-1)
        mixed = g.op("Transpose", g.op("MatMul", attention, split[2]), perm=[0, 2, 1, 3])
        mixed = g.op("Reshape", mixed, g.ints(0, 0, width))
        x = g.op("Add", x, self._layer(mixed, name + "out", probe))
        inner = g.op("Relu", self._layer(self._norm(x, name + "feed_norm"), name + "up", probe))
        return g.op("Add", x, self._layer(inner, name + "down", probe))

    def _tail(self, x: str) -> str:
        return self.graph.op("Slice", x, self.graph.ints(-1), self.graph.ints(1 << 31), self.graph.ints(1))

    def _heads(self, x: str, kind: str) -> str:
        heads = self.params.heads
        parts = self.graph.op("Reshape", x, self.graph.ints(0, 0, heads, self.params.width // heads))
        return self.graph.op("Transpose", parts, perm=[0, 2, 3, 1] if kind == "k" else [0, 2, 1, 3])

    def _norm(self, x: str, name: str) -> str:
        scale = self.graph.constant(self.weights[name + ".weight"], name + ".weight")
        shift = self.graph.constant(self.weights[name + ".bias"], name + ".bias")
        return self.graph.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=1e-5)

    def _layer(self, x: str, name: str, probe: bool) -> str:
        return self._linear(x, name, self.weights[name + ".weight"], self.weights[name + ".bias"], probe)

    def _linear(self, x: str, name: str, weight: Array, bias: Array | None, probe: bool) -> str:
        """X @ weight.T + bias, for a weight [out, in]; the output layer's weight is kept as it is for the embedding."""
        g = self.graph
        if probe:
            ends = [g.op("Reshape", g.op(kind, x, keepdims=0), g.ints(1)) for kind in ("ReduceMin", "ReduceMax")]
            g.op("Concat", *ends, axis=0)
            g.nodes[-1].output[0] = f"range.{name}"
            self.probes.append(f"range.{name}")
        if name in self.ranges:
            x = self._fake(x, name)
        if name == OUTPUT:
            return g.op("Gemm", x, self._whole(weight, name, 0), transB=1)
        made = g.op("MatMul", x, self._whole(weight.T, name, 1))
        return made if bias is None else g.op("Add", made, g.constant(bias, name + ".bias"))

    def _fake(self, x: str, name: str) -> str:
        low, high = self.ranges[name]
        low, high = min(low, 0.0), max(high, 0.0)
        step = max(high - low, 1e-8) / 255
        scale = self.graph.constant(np.float32(step), name + ".in_scale")
        zero = self.graph.constant(np.uint8(np.clip(round(-low / step), 0, 255)), name + ".in_zero")
        return self.graph.op("DequantizeLinear", self.graph.op("QuantizeLinear", x, scale, zero), scale, zero)

    def _whole(self, weight: Array, name: str, axis: int) -> str:
        """The weight, INT8 with one scale for each output where the layer has a range."""
        g = self.graph
        if name not in self.ranges:
            return g.constant(weight, name + ".weight")
        values, scale = quantized(weight if axis == 0 else weight.T)
        values = values if axis == 0 else values.T
        names = g.constant(values, name + ".weight"), g.constant(scale, name + ".scale")
        zero = g.constant(np.zeros(len(scale), np.int8), name + ".zero")
        return g.op("DequantizeLinear", *names, zero, axis=axis)

    def _best(self, items: int) -> None:
        """The best items, without padding and what the history holds."""
        g = self.graph
        none = g.constant(np.float32(-np.inf), "none")
        ids = g.op("Pad", "history", g.ints(0, 1, 0, 0), g.constant(np.int64(0), "zero"))  # padding is never shown
        gone = g.op("Expand", none, g.op("Shape", ids))
        left = g.op("ScatterElements", "logits", ids, gone, axis=1)
        g.op("TopK", left, g.ints(min(SHOWN, items)), outputs=2, axis=1)
        g.nodes[-1].output[:] = ["scores", "items"]


def quantized(weight: Array) -> tuple[Array, Array]:
    """Round each row of [out, in] to int8 around 0: values, and one scale a row."""
    scale = np.maximum(np.abs(weight).max(1), 1e-8).astype(np.float32) / 127
    return np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8), scale
