"""The running statistics of batch normalisation, which each process gathers from its own batches.

At the end of an epoch they become the mean of all processes', so that every one of them validates, and rank 0 exports,
the same model. Between two ends they differ, and a checkpoint keeps those of each: a run that goes on ends the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Statistics:
    """Running means and variances of a model; without batch normalisation there are none."""

    def __init__(self, module: nn.Module) -> None:
        self._buffers: dict[str, Tensor] = {
            f"{name}.{key}": value
            for name, each in module.named_modules()
            if isinstance(each, _BatchNorm)
            for key, value in each.named_buffers(recurse=False)
            if value.is_floating_point()
        }

    def average(self) -> None:
        """Replace them by the mean over all processes; every process calls this."""
        if not self._buffers or torch.distributed.get_world_size() == 1:
            return
        flat = torch.cat([value.flatten().float() for value in self._buffers.values()])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        at = 0
        for value in self._buffers.values():
            value.copy_(flat[at : at + value.numel()].view_as(value))
            at += value.numel()

    def state_dict(self) -> dict[str, Any]:
        """This process's own."""
        return dict(self._buffers)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what this process had."""
        for name, value in state.items():
            self._buffers[name].copy_(value)
