"""The classifier's network: a plain residual network (He et al. 2016, arXiv:1512.03385) of basic blocks, and its loss.

`Network` is what is exported and compressed: float pictures in, logits out, every step a module of its own. It has the
names of torchvision's ResNet-18 and 34, so that weights in that layout can be loaded. `Training` wraps it for the
training loop and computes the loss.
"""

# B batch, S side, C classes
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # its usual name

from slipway.workloads.base import Array

ZERO, STEP = 128.0, 1 / 64
"""Pictures enter as (value - 128) / 64: as if quantized, which is what an INT8 model takes them for."""
COARSE, FINE = 64, 32
"""Sides from which the stem divides the picture's by 4, and by 2."""


def normalised(image_BHWC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make bytes [B, S, S, 3] into what the network takes: [B, 3, S, S], channels last in memory."""
    return (image_BHWC.to(dtype) - ZERO).mul_(STEP).permute(0, 3, 1, 2)


class Norm(nn.BatchNorm2d):
    """Batch normalisation whose running statistics stay in fp32 when the network is cast to 16 bits.

    They are means over many batches: in bf16 an update of less than a 256th of the value would be lost.
    """

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Norm:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types for it
        for name in ("running_mean", "running_var"):
            setattr(self, name, getattr(self, name).float())
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each channel."""
        if x.dtype == torch.float32:
            return super().forward(x)
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight.float(),
            self.bias.float(),
            self.training,
            cast(float, self.momentum),
            self.eps,
        )


class Block(nn.Module):
    """Two convolutions, added to their input; the first one may halve the sides."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1, self.relu1 = Norm(out), nn.ReLU()
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2, self.relu2 = Norm(out), nn.ReLU()
        same = stride == 1 and into == out
        self.downsample = None if same else nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), Norm(out))
        nn.init.zeros_(self.bn2.weight)  # a block begins as the identity (Goyal et al. 2017, arXiv:1706.02677)

    def forward(self, x: Tensor) -> Tensor:
        """Give [B, out, ...]."""
        kept = x if self.downsample is None else self.downsample(x)
        inner = self.relu1(self.bn1(self.conv1(x)))
        return cast(Tensor, self.relu2(self.bn2(self.conv2(inner)) + kept))


class Network(nn.Module):
    """Pictures to logits.

    Args:
        classes: number of classes.
        side: of the pictures, in pixels: small ones are not made smaller by the stem.
        width: channels of the first stage, doubled by each further one.
        blocks: of each stage.
        dropout: share of the last features dropped in training.
    """

    def __init__(self, classes: int, side: int, width: int, blocks: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        stride = 1 if side < FINE else 2
        self.conv1 = nn.Conv2d(3, width, 7 if side >= COARSE else 3, stride, 3 if side >= COARSE else 1, bias=False)
        self.bn1, self.relu = Norm(width), nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1) if side >= COARSE else None
        into = width
        for stage, count in enumerate(blocks):
            out = width << stage
            made = [Block(into if n == 0 else out, out, 2 if stage and n == 0 else 1) for n in range(count)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*made))
            into = out
        self.stages = len(blocks)
        self.avgpool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.dropout, self.fc = nn.Dropout(dropout), nn.Linear(into, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Score the classes: [B, 3, S, S] as `normalised` gives them -> logits [B, C]."""
        x = self.relu(self.bn1(self.conv1(x)))
        if self.maxpool is not None:
            x = self.maxpool(x)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return cast(Tensor, self.fc(self.dropout(self.flatten(self.avgpool(x)))))


class Training(nn.Module):
    """The network under training: gives the loss of a batch."""

    def __init__(self, network: Network, smoothing: float) -> None:
        super().__init__()
        self.network, self.smoothing = network, smoothing

    def logits(self, image_BHWC: Tensor) -> Tensor:
        """Score the classes of pictures in bytes: [B, C] in fp32."""
        return cast(Tensor, self.network(normalised(image_BHWC, self.network.fc.weight.dtype)).float())

    def forward(self, image_BHWC: Tensor, label_B: Tensor, other_B: Tensor, share_B: Tensor) -> Tensor:
        """Mean cross entropy; a picture is `label_B` by its share and `other_B` by the rest of it."""
        logits = self.logits(image_BHWC)
        first = F.cross_entropy(logits, label_B, reduction="none", label_smoothing=self.smoothing)
        second = F.cross_entropy(logits, other_B, reduction="none", label_smoothing=self.smoothing)
        return (share_B * first + (1 - share_B) * second).mean()


class Served(nn.Module):
    """The classifier as a service asks it, in torch: what torch.compile takes, and for comparison with the engines."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Score the classes of pictures in bytes [B, S, S, 3]."""
        logits = self.network(normalised(image))
        return {"logits": logits, "probabilities": logits.softmax(1)}


def network(weights: Mapping[str, Array], about: Mapping[str, Any]) -> Network:
    """Make the trained network again, for evaluation.

    Args:
        weights: arrays by name, of weights.npz.
        about: model.json.
    """
    made = Network(len(about["classes"]), about["image_size"], about["width"], about["blocks"], about["dropout"])
    made.load_state_dict({name: torch.from_numpy(np.asarray(value)) for name, value in weights.items()})
    return made.eval()
