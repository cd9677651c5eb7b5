"""torch.compile's machine code as an engine: a package that AOTInductor made (`slipway.compression.compiled`).

It is the one engine whose model is code, so nothing but its name in `serve.engine` has a replica load it, and torch has
to be installed. torch's C++ loader opens the package: nothing of it is unpickled.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from slipway.workloads.base import Array, Tensors

FILE = "model.pt2"
"""What it is called in a model package."""
INSTRUCTIONS = re.compile(r"(amx|avx|bmi|f16c|fma|gfni|sse|vaes|vpclmul)")


def absent() -> str:
    """Say why torch is not here; nothing if it is."""
    return "" if find_spec("torch") else "No module named 'torch'"


def machine() -> dict[str, str]:
    """What compiled code has to find again: torch's version, and the processor's instruction sets."""
    import torch

    try:
        told = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # no Linux
        told = None
    sets = {flag for flag in (told[1].split() if told else []) if INSTRUCTIONS.match(flag)}
    return {"torch": torch.__version__, "instructions": " ".join(sorted(sets))}


class Inductor:
    """A compiled package.

    Args:
        model: its file, or its bytes.
        threads: of torch, in the whole process.

    Raises:
        ValueError: it was compiled for another torch, or a processor that has what this one has not.
    """

    name = "inductor"

    def __init__(self, model: Path | bytes, threads: int) -> None:
        import torch
        from torch._C._aoti import AOTIModelPackageLoader

        torch.set_num_threads(threads)
        self._torch: Any = torch
        if isinstance(model, bytes):
            with tempfile.NamedTemporaryFile(suffix=".pt2") as file:  # it is unpacked elsewhere, at once
                file.write(model)
                file.flush()
                self._loaded = AOTIModelPackageLoader(file.name, "model", False, 1, -1)
        else:
            self._loaded = AOTIModelPackageLoader(str(model), "model", False, 1, -1)
        about, here = self._loaded.get_metadata(), machine()
        if about.get("torch") != here["torch"]:
            raise ValueError(f"compiled by torch {about.get('torch')}, here is {here['torch']}")
        if lacking := set(about["instructions"].split()) - set(here["instructions"].split()):
            raise ValueError(f"compiled for a processor with {', '.join(sorted(lacking))}, which this one has not")
        self.inputs, self.outputs = about["inputs"].split(), about["outputs"].split()

    def run(self, inputs: Tensors, outputs: Sequence[str]) -> list[Array]:
        """Run one batch: inputs [B, ...] by name; gives the named outputs [B, ...] in order."""
        # torch takes no array that is read-only, as those are that came over the network: they are copied.
        given = [self._torch.from_numpy(np.require(inputs[name], requirements=["C", "W"])) for name in self.inputs]
        found = dict(zip(self.outputs, self._loaded.run(given), strict=True))
        return [found[name].numpy() for name in outputs]
