"""Structured pruning with torch-pruning (Fang et al. 2023, DepGraph, arXiv:2301.12900): whole channels are taken out.

Channels that depend on one another, such as those that a residual connection adds up, are found and taken out together:
those whose weights are smallest. It is done in steps, with training after each, so that the network can recover.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

STEP = 0.25  # most of the channels that one step takes out
MULTIPLE = 16
"""Channels that are left are a multiple of it: what a vector instruction takes at once; and with 8 or 24 channels torch
2.13 crashes in the backward pass of a batch normalisation, channels last, on two threads."""


def steps(share: float) -> int:
    """Number of steps in which a share of the channels is taken out."""
    return max(1, math.ceil(share / STEP - 1e-9))


def prune(network: nn.Module, example: torch.Tensor, share: float) -> Iterator[int]:
    """Take channels out of `network`, in place; after each step its number is given, and the network may be trained.

    Args:
        network: whose last linear layer answers, and keeps its outputs.
        example: an input.
        share: of each layer's channels that is gone at the end, as far as `MULTIPLE` allows.
    """
    import torch_pruning

    answer = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    count = steps(share)
    pruner = torch_pruning.pruner.BasePruner(
        network,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=share,
        iterative_steps=count,
        ignored_layers=[answer],
        round_to=MULTIPLE,
    )
    for step in range(1, count + 1):
        pruner.step()
        yield step
