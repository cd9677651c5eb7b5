"""The classifier as an ONNX graph, in FP32 or INT8, made from its weights, whatever number of channels they have.

Each normalisation is folded into the convolution before it. Pictures come in as bytes and are dequantized, which is
their normalisation, so an INT8 model begins without any work. In INT8 every weight has one scale an output channel and
every activation one range; quantize and dequantize nodes stand around each, which ONNX Runtime fuses into integer
kernels.

    image uint8 [B, S, S, 3]  ->  probabilities float32 [B, C], logits float32 [B, C]
"""

# B batch, S side, C classes
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from slipway.workloads.base import Array
from slipway.workloads.classifier.model import COARSE, FINE, STEP, ZERO
from slipway.workloads.graph import Graph, Ranges, quantized

EPSILON = 1e-5  # of torch's batch normalisation
IMAGE = "image"


class ClassifierGraph:
    """Builds the graph; with `ranges` of the activations it is INT8.

    Args:
        weights: arrays by the names of `model.Network`.
        about: model.json: image_size, blocks, classes.
        ranges: least and largest value by activation, as a run of the probed graph tells them.
    """

    def __init__(self, weights: Mapping[str, Array], about: Mapping[str, Any], ranges: Ranges | None = None) -> None:
        self.graph, self.weights = Graph(ranges), weights
        self.side, self.blocks = int(about["image_size"]), list(about["blocks"])
        self.classes = len(about["classes"])
        self.probing = False

    def build(self, probe: bool = False) -> bytes:
        """Serialise the model; `probe` adds least and largest value of every activation as `range.NAME`: [2]."""
        self.probing = probe
        g, side = self.graph, self.side
        channels = g.op("Transpose", IMAGE, perm=[0, 3, 1, 2])
        # The same node that would dequantize an INT8 tensor: (value - 128) / 64.
        scale, zero = g.constant(np.float32(STEP), "image.scale"), g.constant(np.uint8(ZERO), "image.zero")
        logits = self._head(self._features(g.op("DequantizeLinear", channels, scale, zero)))
        g.output("logits", logits)
        g.output("probabilities", g.op("Softmax", logits, axis=-1))
        given = [helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, ["B", side, side, 3])]
        kind, shape = TensorProto.FLOAT, ["B", self.classes]
        made = [helper.make_tensor_value_info(name, kind, shape) for name in ("probabilities", "logits")]
        made += [helper.make_tensor_value_info(name, kind, [2]) for name in g.probes]
        return g.model("classifier", given, made)

    def _features(self, x: str) -> str:
        """Features of a picture, pooled: [B, D, 1, 1]."""
        g = self.graph
        stride = 1 if self.side < FINE else 2
        x = self._activation(g.op("Relu", self._convolution(x, "conv1", "bn1", stride, STEP)), "relu")
        of = "relu"
        if self.side >= COARSE:
            x = self._again(g.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]), of)
        for stage, count in enumerate(self.blocks, 1):
            for number in range(count):
                name = f"layer{stage}.{number}."
                x = self._block(x, of, name, 2 if stage > 1 and number == 0 else 1)
                of = name + "relu2"
        return self._activation(g.op("GlobalAveragePool", x), "avgpool")

    def _block(self, x: str, of: str, name: str, stride: int) -> str:
        g, scale = self.graph, self._scale(of)
        kept = x
        if name + "downsample.0.weight" in self.weights:
            kept = self._convolution(x, name + "downsample.0", name + "downsample.1", stride, scale)
            kept = self._activation(kept, name + "downsample")
        inner = g.op("Relu", self._convolution(x, name + "conv1", name + "bn1", stride, scale))
        inner = self._activation(inner, name + "relu1")
        outer = self._convolution(inner, name + "conv2", name + "bn2", 1, self._scale(name + "relu1"))
        outer = self._activation(outer, name + "conv2.out")
        total = g.op("Add", outer, kept)
        # In INT8 rounding to a range that begins at 0 cuts what is below: without the node the sum is an integer one.
        return self._activation(total if g.ranges else g.op("Relu", total), name + "relu2")

    def _convolution(self, x: str, name: str, norm: str, stride: int, scale: float) -> str:
        """A convolution with the normalisation behind it; `scale` is of its input, where it is INT8."""
        weight, bias = folded(self.weights, name, norm)
        side = weight.shape[-1]
        given = self._parameters(weight, bias, name, scale)
        return self.graph.op(
            "Conv", x, *given, kernel_shape=[side, side], strides=[stride, stride], pads=[side // 2] * 4
        )

    def _head(self, pooled: str) -> str:
        flat = self.graph.op("Flatten", pooled, axis=1)
        given = self._parameters(self.weights["fc.weight"], self.weights["fc.bias"], "fc", self._scale("avgpool"))
        return self.graph.op("Gemm", flat, *given, transB=1)

    def _parameters(self, weight: Array, bias: Array, name: str, scale: float) -> tuple[str, str]:
        """Constants of a layer: in INT8 its bias is an integer in units of the input's scale times the weight's."""
        g = self.graph
        if not g.ranges:
            return g.constant(weight, name + ".weight"), g.constant(bias, name + ".bias")
        values, scales = quantized(weight.reshape(len(weight), -1))
        whole = g.constant(values.reshape(weight.shape), name + ".weight")
        zero = g.constant(np.zeros(len(scales), np.int8), name + ".zero")
        dense = g.op("DequantizeLinear", whole, g.constant(scales, name + ".scale"), zero, axis=0)
        unit = (scales * np.float32(scale)).astype(np.float32)
        rounded = np.clip(np.rint(bias / unit), -(2**31), 2**31 - 1).astype(np.int32)
        names = g.constant(rounded, name + ".bias"), g.constant(unit, name + ".bias_scale")
        none = g.constant(np.zeros(len(scales), np.int32), name + ".bias_zero")
        return dense, g.op("DequantizeLinear", *names, none, axis=0)

    def _activation(self, x: str, name: str) -> str:
        return self.graph.entering(x, name, self.probing)

    def _again(self, x: str, name: str) -> str:
        """Round what has the range of the activation `name`, as a largest value of some of its elements has."""
        return self.graph.entering(x, name, probe=False)

    def _scale(self, name: str) -> float:
        """Scale of an INT8 activation, as `Graph` rounds it; of no account in FP32."""
        if name not in self.graph.ranges:
            return 1.0
        return float(self.graph.constants[name + ".in_scale"].item())


def folded(weights: Mapping[str, Array], name: str, norm: str) -> tuple[Array, Array]:
    """Weight [out, in, k, k] and bias [out] of a convolution and the normalisation behind it, as one convolution."""
    factor = weights[norm + ".weight"] / np.sqrt(weights[norm + ".running_var"] + EPSILON)
    bias = weights[norm + ".bias"] - weights[norm + ".running_mean"] * factor
    return (weights[name + ".weight"] * factor[:, None, None, None]).astype(np.float32), bias.astype(np.float32)
