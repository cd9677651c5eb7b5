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

import numpy as np
from onnx import TensorProto, helper

from slipway.workloads.base import Array
from slipway.workloads.graph import Graph, Ranges, quantized
from slipway.workloads.ranker.params import RankerParams

SHOWN = 100
GROUP = 64  # items of a group, when there are many
WORTH = 2  # groups are worth it from this multiple of the items in the best groups on
HIDDEN = np.float32(-1e9)
OUTPUT = "item"  # name of the output layer among the linear layers


class RankerGraph:
    """Builds the graph; with `ranges` of a layer's inputs, that layer is INT8."""

    def __init__(self, weights: Mapping[str, Array], params: RankerParams, ranges: Ranges | None = None) -> None:
        self.graph, self.weights, self.params = Graph(ranges), weights, params

    def build(self, probe: bool = False) -> bytes:
        """Serialise the model; `probe` adds least and largest input of every linear layer as `range.LAYER`: [2]."""
        g, items = self.graph, self.weights["item.weight"].shape[0] - 1
        state = self._encode(probe)
        logits = self._linear(state, OUTPUT, self.weights["item.weight"], None, probe)
        g.output("logits", logits)
        self._best(logits, items)
        shown = min(SHOWN, items)
        outputs = [
            helper.make_tensor_value_info("items", TensorProto.INT64, ["B", shown]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", shown]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", items + 1]),
        ]
        outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in g.probes]
        return g.model("ranker", [helper.make_tensor_value_info("history", TensorProto.INT64, ["B", "T"])], outputs)

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
        if OUTPUT not in g.ranges:
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
        if name == OUTPUT:
            return g.op("Gemm", g.entering(x, name, probe), g.whole(weight, name, 0), transB=1)
        return g.linear(x, name, weight, bias, probe)

    def _best(self, logits: str, items: int) -> None:
        """The best items, without padding and what the history holds."""
        g, shown = self.graph, min(SHOWN, items)
        none = g.constant(np.float32(-np.inf), "none")
        ids = g.op("Pad", "history", g.ints(0, 1, 0, 0), g.constant(np.int64(0), "zero"))  # padding is never shown
        gone = g.op("Expand", none, g.op("Shape", ids))
        left = g.op("ScatterElements", logits, ids, gone, axis=1)
        if items + 1 <= WORTH * SHOWN * GROUP:
            best = g.op("TopK", left, g.ints(shown), outputs=2, axis=1)
            chosen = best + ".1"
        else:
            best, chosen = self._grouped(left, items + 1, none)
        g.output("scores", best)
        g.output("items", chosen)

    def _grouped(self, logits: str, count: int, none: str) -> tuple[str, str]:
        """The best of many: they lie in the groups whose largest value is largest, and TopK is slow on long rows."""
        g = self.graph
        padded = g.op("Pad", logits, g.ints(0, 0, 0, -count % GROUP), none)
        groups = g.op("Reshape", padded, g.ints(0, -1, GROUP))
        largest = g.op("ReduceMax", groups, g.ints(2), keepdims=0)
        top = g.op("TopK", largest, g.ints(SHOWN), outputs=2, axis=1)
        places = g.op("Expand", g.op("Unsqueeze", f"{top}.1", g.ints(2)), g.ints(1, 1, GROUP))
        few = g.op("Reshape", g.op("GatherElements", groups, places, axis=1), g.ints(0, -1))
        best = g.op("TopK", few, g.ints(SHOWN), outputs=2, axis=1)
        width = g.ints(GROUP)
        group = g.op("GatherElements", f"{top}.1", g.op("Div", f"{best}.1", width), axis=1)
        return best, g.op("Add", g.op("Mul", group, width), g.op("Mod", f"{best}.1", width))
