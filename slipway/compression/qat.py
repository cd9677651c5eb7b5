"""Quantization-aware training (Jacob et al. 2018, arXiv:1712.05877) through torchao's pt2e: a network that rounds.

`prepare` makes of a network one that rounds weights and activations to INT8 in its forward pass, and learns the ranges
of its activations while it is trained. They are rounded where the workload's ONNX graph in INT8 rounds them, so that
this graph, built from the trained weights and `ranges`, gives the answers of the rounding network. (torch's own export
of a converted network rounds where torchao's quantizers do: ONNX Runtime then runs the layers before a sum in FP32.)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
from torch import fx, nn

from slipway.workloads.base import Array
from slipway.workloads.graph import Ranges

logging.getLogger("torchao").setLevel(logging.ERROR)  # it tells of each library for a GPU that it could not load
from torchao.quantization.pt2e import (  # noqa: E402
    FusedMovingAvgObsFakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    allow_exported_model_train_eval,
)
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e  # noqa: E402
from torchao.quantization.pt2e.quantizer import (  # noqa: E402
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)

ACTIVATION = QuantizationSpec(
    dtype=torch.uint8,
    quant_min=0,
    quant_max=255,
    qscheme=torch.per_tensor_affine,
    observer_or_fake_quant_ctr=FusedMovingAvgObsFakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver, averaging_constant=0.01
    ),
)
# One scale an output channel, of the weights as they are: a mean over the past would lag behind them.
WEIGHT = QuantizationSpec(
    dtype=torch.int8,
    quant_min=-127,
    quant_max=127,
    qscheme=torch.per_channel_symmetric,
    ch_axis=0,
    observer_or_fake_quant_ctr=FusedMovingAvgObsFakeQuantize.with_args(
        observer=MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0
    ),
)
LAYERS = {torch.ops.aten.conv2d.default, torch.ops.aten.linear.default}


class _AsServed(Quantizer):  # type: ignore[misc]  # mypy does not follow torchao
    """Rounds the weights of all layers, and the outputs of the modules that the INT8 graph rounds."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self.modules = modules

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Say of each node what is rounded."""
        last = {path: node for node in model.graph.nodes if (path := _module(node)) in self.modules}
        for node in model.graph.nodes:
            rounded = ACTIVATION if node in last.values() else None
            # torchao wants a word on a layer's input too, which was rounded where it came from.
            weights = {node.args[0]: None, node.args[1]: WEIGHT} if node.target in LAYERS else {}
            if rounded or weights:
                node.meta["quantization_annotation"] = QuantizationAnnotation(weights, rounded, _annotated=True)
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing that `annotate` has not seen to."""


def _module(node: fx.Node) -> str:
    """Path of the innermost module that a node comes from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).removeprefix("L['self'].") if stack and node.op == "call_function" else ""


def prepare(network: nn.Module, example: torch.Tensor, modules: Mapping[str, str]) -> fx.GraphModule:
    """Make a network that rounds as the INT8 graph does, and learns the ranges it rounds to.

    Args:
        network: takes one tensor; batch normalisations with a weight of exactly zero cannot be rounded.
        example: [B, ...] input, B over 1; all but the second dimension may vary.
        modules: path of a module in `network` -> name of its output among the ranges of the INT8 graph.
    """
    automatic = torch.export.Dim.AUTO
    free = ({at: automatic for at in range(example.dim()) if at != 1},)
    program = torch.export.export(network.train(), (example.clone(),), dynamic_shapes=free)  # it saves a whole storage
    prepared: fx.GraphModule = prepare_qat_pt2e(program.module(), _AsServed(modules))
    allow_exported_model_train_eval(prepared)
    return prepared


def rounding(prepared: fx.GraphModule, modules: Mapping[str, str]) -> dict[str, str]:
    """Where a network keeps its ranges: name among the INT8 graph's ranges -> path of what rounds there.

    Asked right after `prepare`: torchao replaces nodes when the network is put to evaluation.
    """
    return dict(_rounding(prepared, modules))


def _rounding(prepared: fx.GraphModule, modules: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for node in prepared.graph.nodes:
        if node.op == "call_module" and str(node.target).startswith("activation_post_process"):
            path = _module(node.args[0])
            if path in modules:
                yield modules[path], str(node.target)


def ranges(weights: Mapping[str, Array], places: Mapping[str, str]) -> Ranges:
    """Learned ranges by name: what 0 and 255 stand for.

    Args:
        weights: state of the trained, prepared network.
        places: as `rounding` gave them.
    """
    found: dict[str, tuple[float, float]] = {}
    for name, place in places.items():
        scale, zero = float(weights[f"{place}.scale"][0]), int(weights[f"{place}.zero_point"][0])
        found[name] = (-zero * scale, (255 - zero) * scale)
    return found
