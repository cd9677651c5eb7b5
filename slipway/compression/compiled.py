"""torch as an engine: line by line, to compare with; and through torch.compile, as a package of machine code."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipway.serving import inductor
from slipway.workloads.base import Array, Tensors

if TYPE_CHECKING:
    import torch

COMPILER = "g++"


class Torch:
    """A module that takes the model's inputs and gives its outputs, both by name.

    Args:
        module: such as an export's `module()`.
        threads: of torch, in the whole process.
    """

    name = "torch"

    def __init__(self, module: torch.nn.Module, threads: int = 1) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch = torch
        self._run = module.eval()

    def run(self, inputs: Tensors, outputs: Sequence[str]) -> list[Array]:
        """Run one batch: inputs [B, ...] by name; gives the named outputs [B, ...] in order."""
        with self._torch.inference_mode():
            found = self._run(**{name: self._torch.from_numpy(value) for name, value in inputs.items()})
        return [found[name].numpy() for name in outputs]


def absent() -> str:
    """Say why nothing can be compiled here; nothing if it can."""
    return "" if shutil.which(COMPILER) else f"inductor has no C++ compiler here: apt-get install {COMPILER}"


def package(module: torch.nn.Module, example: Tensors, threads: int = 1) -> bytes:
    """Compile a module ahead of time (AOTInductor), for this torch and this processor; takes half a minute.

    Args:
        module: takes the model's inputs and gives its outputs, both by name, such as an export's `module()`.
        example: inputs [B, ...]. Dimensions that the module does not need fixed may be others later; here none may be
            1, and no two equal, or torch would take it that they always are.
        threads: that loops are made for.
    """
    import torch

    automatic = torch.export.Dim.AUTO
    given = {name: torch.from_numpy(value.copy()) for name, value in example.items()}
    free = {name: dict.fromkeys(range(value.dim()), automatic) for name, value in given.items()}
    torch.set_num_threads(threads)
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="slipway-") as folder:
        outputs = list(module.eval()(**given))
        program = torch.export.export(module, (), kwargs=given, dynamic_shapes=free)
        about = {"inputs": " ".join(given), "outputs": " ".join(outputs), **inductor.machine()}
        settings: dict[str, Any] = {"aot_inductor.metadata": about, "freezing": True}
        place = Path(folder) / inductor.FILE
        torch._inductor.aoti_compile_and_package(program, package_path=str(place), inductor_configs=settings)
        return place.read_bytes()
