"""The ranker as an ONNX graph, in FP32 or INT8, made from its weights.

It answers for the last place of a history alone, so the last block computes one query a history. The item matrix is
stored once and serves both as the embedding and as the output layer: in INT8 it is a quarter of the size, symmetric,
with one scale a dimension. The state takes these scales before it is rounded, so the output layer is one integer matrix
product with one scale in all, which ONNX Runtime computes faster than one with a scale an item. The engine turns the
matrix for the embedding when it loads the model (an edge package is optimised beforehand, and holds both). The first
output lists the best items.

    history int64 [B, T]  ->  items int64 [B, K], scores float32 [B, K], logits float32 [B, I+1]
"""

# B batch, T time, D width, I items, K shown
from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from onnx import TensorProto, helper

from slipway.workloads.base import Array
from slipway.workloads.graph import Graph, Ranges, quantized
from slipway.workloads.ranker.params import RankerParams

SHOWN = 100
HIDDEN = np.float32(-1e9)
OUTPUT = "item"  # name of the output layer among the linear layers


class RankerGraph:
    """Builds the graph; with `ranges` of a layer's inputs, that layer is INT8."""

    def __init__(self, weights: Mapping[str, Array], params: RankerParams, ranges: Ranges | None = None) -> None:
        self.graph, self.weights, self.params = Graph(ranges), weights, params

    def build(self, probe: bool = False) -> bytes:
        """Serialise the model; `probe` adds least and largest input of every linear layer as `range.LAYER`: [2]."""
        g, table = self.graph, self.weights["item.weight"]
        items = len(table) - 1
        logits = g.output("logits", self._output(self._encode(table, probe), table, probe))
        self._best(logits, items)
        shown = min(SHOWN, items)
        outputs = [
            helper.make_tensor_value_info("items", TensorProto.INT64, ["B", shown]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", shown]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", items + 1]),
        ]
        outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in g.probes]
        return g.model("ranker", [helper.make_tensor_value_info("history", TensorProto.INT64, ["B", "T"])], outputs)

    def _encode(self, table: Array, probe: bool) -> str:
        """State after the last item: [B, D]."""
        g, params = self.graph, self.params
        back = g.op("Neg", g.op("Shape", "history", start=1))  # slices count from the end, as positions do
        end = g.ints(params.max_length)
        places = g.constant(self.weights["place.weight"][::-1], "places")
        x = g.op("Add", self._embed(table), g.op("Slice", places, back, end, g.ints(0)))
        padding = g.op("Equal", "history", g.constant(np.int64(0), "zero"))
        keys = g.op("Where", padding, g.constant(HIDDEN, "hidden"), g.constant(np.float32(0), "shown"))
        keys = g.op("Unsqueeze", keys, g.ints(1) if params.heads == 1 else g.ints(1, 2))  # [B, 1, T] or [B, 1, 1, T]
        mask = keys
        if params.blocks > 1:
            square = g.op("Expand", g.constant(HIDDEN, "hidden"), g.ints(params.max_length, params.max_length))
            future = g.op("Trilu", square, g.scalar(1), upper=1)  # by the engine, when it loads the model
            both = g.op("Concat", back, back, axis=0)
            ends = g.ints(params.max_length, params.max_length)
            mask = g.op("Add", keys, g.op("Slice", future, both, ends, g.ints(0, 1)))
        for block in range(params.blocks):
            last = block == params.blocks - 1
            x = self._block(x, f"blocks.{block}.", keys if last else mask, last, probe)
        return self._norm(g.op("Squeeze", x, g.ints(1)), "norm")

    def _embed(self, table: Array) -> str:
        """The items of a history: [B, T, D]."""
        g = self.graph
        if OUTPUT not in g.ranges:
            return g.op("Gather", g.constant(table, "item.weight"), "history")
        whole, scale = quantized(table.T)
        turned = g.op("Transpose", g.constant(whole, "item.weight"), perm=[1, 0])  # by the engine, when it loads it
        return g.op("DequantizeLinear", g.op("Gather", turned, "history"), g.constant(scale, "item.scale"), axis=2)

    def _output(self, state: str, table: Array, probe: bool) -> str:
        """Scores of all items, from the matrix that the embedding reads: [B, I+1].

        In INT8 the state takes the matrix's scales, so the product has one range in all: that is what is probed.
        """
        g, scaled = self.graph, state
        if probe or OUTPUT in g.ranges:
            scaled = g.entering(g.op("Mul", state, g.constant(quantized(table.T)[1], "item.scale")), OUTPUT, probe)
        if OUTPUT not in g.ranges:
            return g.op("Gemm", state, g.constant(table, "item.weight"), transB=1)
        # No Gemm: ONNX Runtime would pack its integer matrix anew for every request.
        return g.op("MatMul", scaled, g.op("DequantizeLinear", "item.weight", g.constant(np.float32(1), "one")))

    def _block(self, x: str, name: str, mask: str, last: bool, probe: bool) -> str:
        """A block: [B, T, D]; the last one answers for the last place alone: [B, 1, D]."""
        g = self.graph
        around = self._norm(x, name + "attention_norm")
        asking, x = (self._tail(around), self._tail(x)) if last else (around, x)
        attend = self._attend_whole if self.params.heads == 1 else self._attend_heads
        x = g.op("Add", x, attend(asking, around, name, mask, probe))
        inner = g.op("Relu", self._layer(self._norm(x, name + "feed_norm"), name + "up", probe))
        return g.op("Add", x, self._layer(inner, name + "down", probe))

    def _attend_whole(self, asking: str, around: str, name: str, mask: str, probe: bool) -> str:
        """Attention of one head, whose four matrices are two: key and query are only multiplied, value and output, too.

        What a key's bias adds is the same for all keys, and the weights of an attention add up to one.
        """
        g = self.graph
        (query, key, value), (shift, _, moved) = self._split(name)
        query, shift = key.T @ query / math.sqrt(len(key)), key.T @ shift / math.sqrt(len(key))
        out, bias = self.weights[name + "out.weight"], self.weights[name + "out.bias"]
        asked = self._linear(asking, name + "query", query, shift, probe)
        logits = g.op("Add", g.op("MatMul", asked, g.op("Transpose", around, perm=[0, 2, 1])), mask)
        mixed = g.op("MatMul", g.op("Softmax", logits, axis=-1), around)
        return self._linear(mixed, name + "out", out @ value, out @ moved + bias, probe)

    def _attend_heads(self, asking: str, around: str, name: str, mask: str, probe: bool) -> str:
        g, width = self.graph, self.params.width
        (query, key, value), (shift, other, moved) = self._split(name)
        scale = math.sqrt(width // self.params.heads)
        asked = self._linear(asking, name + "query", query / scale, shift / scale, probe)
        both = np.concatenate([key, value]), np.concatenate([other, moved])
        keys = g.op("Split", self._linear(around, name + "key_value", *both, probe), outputs=2, axis=-1, num_outputs=2)
        split = [self._heads(part, order) for part, order in ((asked, "q"), (keys, "k"), (f"{keys}.1", "v"))]
        attention = g.op("Softmax", g.op("Add", g.op("MatMul", split[0], split[1]), mask), axis=-1)
        mixed = g.op("Transpose", g.op("MatMul", attention, split[2]), perm=[0, 2, 1, 3])
        mixed = g.op("Reshape", mixed, g.ints(0, 0, width))
        return self._layer(mixed, name + "out", probe)

    def _split(self, name: str) -> tuple[list[Array], list[Array]]:
        """Weights [D, D] and biases [D] of query, key and value."""
        weight, bias = self.weights[name + "qkv.weight"], self.weights[name + "qkv.bias"]
        return np.split(weight, 3), np.split(bias, 3)

    def _tail(self, x: str) -> str:
        return self.graph.op("Gather", x, self.graph.ints(-1), axis=1)

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

    def _linear(self, x: str, name: str, weight: Array, bias: Array, probe: bool) -> str:
        """X @ weight.T + bias."""
        return self.graph.linear(x, name, weight.astype(np.float32), bias.astype(np.float32), probe)

    def _best(self, logits: str, items: int) -> None:
        """The best items, without padding and what the history holds."""
        g = self.graph
        ids = g.op("Pad", "history", g.ints(0, 0, 0, 1))  # one place more, with 0: the padding
        gone = g.op("Expand", g.constant(np.float32(-np.inf), "none"), g.op("Shape", ids))
        left = g.op("ScatterElements", logits, ids, gone, axis=1)
        best = g.op("TopK", left, g.ints(min(SHOWN, items)), outputs=2, axis=1)
        g.output("scores", best)
        g.output("items", f"{best}.1")
