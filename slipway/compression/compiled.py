"""torch as an engine, line by line or through torch.compile: what the others are compared with.

A replica has no torch, so nothing is served by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slipway.workloads.base import Array, Tensors


class Torch:
    """A module that takes the model's inputs and gives its outputs, both by name.

    Args:
        module: such as an export's `module()`.
        compiled: by torch.compile, which needs a C++ compiler, and compiles at the first run of each kind of shape.
        threads: of torch, in the whole process.
    """

    def __init__(self, module: torch.nn.Module, compiled: bool, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        self.name = "torch.compile" if compiled else "torch"
        self._run = torch.compile(module.eval(), dynamic=True) if compiled else module.eval()

    def run(self, inputs: Tensors, outputs: Sequence[str]) -> list[Array]:
        """Run one batch: inputs [B, ...] by name; gives the named outputs [B, ...] in order."""
        with torch.inference_mode():
            found = self._run(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        return [found[name].numpy() for name in outputs]
