"""An ONNX graph under construction, and its linear layers in FP32 or INT8.

In INT8 a layer's weight has one scale an output, its input one range, which a run of the probed model tells. Both stand
as quantize and dequantize nodes around a matrix product, which ONNX Runtime fuses into an integer one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from slipway.workloads.base import Array

OPSET = 18

Ranges = Mapping[str, tuple[float, float]]


class Graph:
    """Collects nodes and constants; every method gives the name of what it computes."""

    def __init__(self, ranges: Ranges | None = None) -> None:
        self.ranges = ranges or {}
        """Of the inputs of the layers that are INT8, by layer."""
        self.probes: list[str] = []
        """Outputs `range.LAYER` of a probed graph."""
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Add a node; with several outputs, their names are the first one's with .1, .2 … behind."""
        name = f"{kind}{len(self.nodes)}"
        names = [name, *(f"{name}.{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return name

    def constant(self, value: Any, name: str | None = None) -> str:
        """Add a constant, or find it by its name; a number has no dimensions: only so are sums in INT8 fused."""
        name = name or f"constant{len(self.constants)}"
        self.constants.setdefault(name, np.asarray(value, order="C"))
        return name

    def ints(self, *values: int) -> str:
        """Add a constant vector of int64."""
        return self.constant(np.array(values, np.int64), "ints" + "_".join(map(str, values)))

    def scalar(self, value: int) -> str:
        """Add a constant int64 without dimensions."""
        self.constants.setdefault(f"scalar{value}", np.array(value, np.int64))
        return f"scalar{value}"

    def model(self, name: str, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> bytes:
        """Check and serialise the graph."""
        constants = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, name, inputs, outputs, constants)
        opsets = [helper.make_opsetid("", OPSET)]
        made = helper.make_model(graph, opset_imports=opsets, ir_version=9, producer_name="slipway")
        onnx.checker.check_model(made)
        data: bytes = made.SerializeToString()
        return data

    def output(self, name: str, value: str) -> str:
        """Make what a node computes an output, by renaming it: a node that only renames is a copy for each request."""
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [name if each == value else each for each in names]
        return name

    def linear(self, x: str, name: str, weight: Array, bias: Array | None = None, probe: bool = False) -> str:
        """X @ weight.T + bias, for a weight [out, in]; INT8 where the layer has a range.

        Args:
            x: the input [..., in].
            name: of the layer.
            weight: [out, in] float32.
            bias: [out] float32.
            probe: whether the input's range becomes an output.
        """
        made = self.op("MatMul", self.entering(x, name, probe), self.whole(weight.T, name))
        return made if bias is None else self.op("Add", made, self.constant(bias, name + ".bias"))

    def entering(self, x: str, name: str, probe: bool) -> str:
        """The input of the layer `name`: probed, if wished, and rounded where the layer has a range."""
        if probe:
            least, most = (self.op(kind, x, keepdims=0) for kind in ("ReduceMin", "ReduceMax"))
            ends = [self.op("Reshape", end, self.ints(1)) for end in (least, most)]
            self.output(f"range.{name}", self.op("Concat", *ends, axis=0))
            self.probes.append(f"range.{name}")
        return self._rounded(x, name) if name in self.ranges else x

    def _rounded(self, x: str, name: str) -> str:
        low, high = self.ranges[name]
        low, high = min(low, 0.0), max(high, 0.0)
        step = max(high - low, 1e-8) / 255
        scale = self.constant(np.float32(step), name + ".in_scale")
        zero = self.constant(np.uint8(np.clip(round(-low / step), 0, 255)), name + ".in_zero")
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, scale, zero), scale, zero)

    def whole(self, weight: Array, name: str) -> str:
        """The weight [in, out], INT8 with one scale an output, around 0, where the layer has a range."""
        if name not in self.ranges:
            return self.constant(weight, name + ".weight")
        values, scale = quantized(weight.T)
        return self.op(
            "DequantizeLinear", self.constant(values.T, name + ".weight"), self.constant(scale, name + ".scale"), axis=1
        )


def quantized(weight: Array) -> tuple[Array, Array]:
    """Round each row of [out, in] to int8 around 0: values, and one scale a row."""
    scale = np.maximum(np.abs(weight).max(1), 1e-8).astype(np.float32) / 127
    return np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8), scale
