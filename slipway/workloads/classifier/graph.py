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
WIDE = 4  # pixels of a row that the first convolution takes at a time in INT8


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
        logits = self._head(self._features(IMAGE))
        logits = g.output("logits", logits)
        g.output("probabilities", g.op("Softmax", logits, axis=-1))
        given = [helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, ["B", side, side, 3])]
        kind, shape = TensorProto.FLOAT, ["B", self.classes]
        made = [helper.make_tensor_value_info(name, kind, shape) for name in ("probabilities", "logits")]
        made += [helper.make_tensor_value_info(name, kind, [2]) for name in g.probes]
        return g.model("classifier", given, made)

    def _features(self, image: str) -> str:
        """Features of a picture in bytes, pooled: [B, D, 1, 1]."""
        g = self.graph
        x = self._stem(image)
        if self.side >= COARSE:
            x = self._again(g.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]), "relu")
        for stage, count in enumerate(self.blocks, 1):
            for number in range(count):
                x = self._block(x, f"layer{stage}.{number}.", 2 if stage > 1 and number == 0 else 1)
        return self._activation(g.op("GlobalAveragePool", x), "avgpool")

    def _stem(self, image: str) -> str:
        """The first convolution. In INT8, with a stride of 2, it takes a row of pixels four at a time, where it can.

        ONNX Runtime's integer kernel multiplies four channels at once, and there is none for three. Four neighbours
        are twelve channels without a copy; for them the convolution gives its channels twice, of two places in a row.
        """
        g, side, stride = self.graph, self.side, 1 if self.side < FINE else 2
        weight, bias = folded(self.weights, "conv1", "bn1")
        wide = bool(g.ranges) and stride == 2 and side % WIDE == 0
        if wide:
            image = g.op("Reshape", image, g.ints(-1, side, side // WIDE, 3 * WIDE))
        channels = g.op("Transpose", image, perm=[0, 3, 1, 2])
        # The same node that would dequantize an INT8 tensor: (value - 128) / 64.
        scale, zero = g.constant(np.float32(STEP), "image.scale"), g.constant(np.uint8(ZERO), "image.zero")
        x, pad = g.op("DequantizeLinear", channels, scale, zero), weight.shape[-1] // 2
        if not wide:
            return self._activation(
                g.op("Relu", self._layer(x, weight, bias, "conv1", [stride] * 2, [pad] * 4)), "relu"
            )
        weight, left = widened(weight, stride)
        right = weight.shape[-1] - 1 - left
        x = g.op("Relu", self._layer(x, weight, np.tile(bias, 2), "conv1", [stride, 1], [pad, left, pad, right]))
        x = g.op("Transpose", self._activation(x, "relu"), perm=[0, 2, 3, 1])
        x = g.op("Reshape", x, g.ints(-1, side // 2, side // 2, len(bias)))
        return self._again(g.op("Transpose", x, perm=[0, 3, 1, 2]), "relu")

    def _block(self, x: str, name: str, stride: int) -> str:
        g = self.graph
        kept = x
        if name + "downsample.0.weight" in self.weights:
            kept = self._convolution(x, name + "downsample.0", name + "downsample.1", stride)
            kept = self._activation(kept, name + "downsample")
        inner = g.op("Relu", self._convolution(x, name + "conv1", name + "bn1", stride))
        outer = self._convolution(self._activation(inner, name + "relu1"), name + "conv2", name + "bn2", 1)
        outer = self._activation(outer, name + "conv2.out")
        total = g.op("Add", outer, kept)
        # In INT8 rounding to a range that begins at 0 cuts what is below: without the node the sum is an integer one.
        return self._activation(total if g.ranges else g.op("Relu", total), name + "relu2")

    def _convolution(self, x: str, name: str, norm: str, stride: int) -> str:
        """A convolution with the normalisation behind it."""
        weight, bias = folded(self.weights, name, norm)
        return self._layer(x, weight, bias, name, [stride] * 2, [weight.shape[-1] // 2] * 4)

    def _layer(self, x: str, weight: Array, bias: Array, name: str, strides: list[int], pads: list[int]) -> str:
        given = self._parameters(weight, bias, name)
        return self.graph.op("Conv", x, *given, kernel_shape=list(weight.shape[2:]), strides=strides, pads=pads)

    def _head(self, pooled: str) -> str:
        flat = self.graph.op("Flatten", pooled, axis=1)
        return self.graph.op(
            "Gemm", flat, *self._parameters(self.weights["fc.weight"], self.weights["fc.bias"], "fc"), transB=1
        )

    def _parameters(self, weight: Array, bias: Array, name: str) -> tuple[str, str]:
        """Constants of a layer. The engine rounds the bias itself, to the step of the products that it is added to."""
        g = self.graph
        if not g.ranges:
            return g.constant(weight, name + ".weight"), g.constant(bias, name + ".bias")
        values, scales = quantized(weight.reshape(len(weight), -1))
        whole = g.constant(values.reshape(weight.shape), name + ".weight")
        dense = g.op("DequantizeLinear", whole, g.constant(scales, name + ".scale"), axis=0)
        return dense, g.constant(bias, name + ".bias")

    def _activation(self, x: str, name: str) -> str:
        return self.graph.entering(x, name, self.probing)

    def _again(self, x: str, name: str) -> str:
        """Round what has the range of the activation `name`, as a largest value of some of its elements has."""
        return self.graph.entering(x, name, probe=False)


def folded(weights: Mapping[str, Array], name: str, norm: str) -> tuple[Array, Array]:
    """Weight [out, in, k, k] and bias [out] of a convolution and the normalisation behind it, as one convolution."""
    factor = weights[norm + ".weight"] / np.sqrt(weights[norm + ".running_var"] + EPSILON)
    bias = weights[norm + ".bias"] - weights[norm + ".running_mean"] * factor
    return (weights[name + ".weight"] * factor[:, None, None, None]).astype(np.float32), bias.astype(np.float32)


def widened(weight: Array, stride: int) -> tuple[Array, int]:
    """A convolution over blocks of `WIDE` pixels of a row that gives what one over its pixels gives, to the bit.

    Args:
        weight: [out, in, k, k], whose padding is k // 2.
        stride: of the one over pixels; blocks are taken one by one.

    Returns:
        The weight [P * out, WIDE * in, k, K] for the P = WIDE / stride places of a block, and its padding on the left.
    """
    out, into, high, side = weight.shape
    places = WIDE // stride
    taken = [divmod(place * stride + at - side // 2, WIDE) for place in range(places) for at in range(side)]
    first, last = taken[0][0], max(block for block, _ in taken)
    made = np.zeros((places, out, WIDE, into, high, last - first + 1), weight.dtype)
    for at, (block, pixel) in enumerate(taken):
        made[at // side, :, pixel, :, :, block - first] = weight[..., at % side]
    return made.reshape(places * out, WIDE * into, high, -1), -first
