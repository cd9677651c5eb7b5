"""Tasks for tests of the loader: importable in a worker at little cost, each batch a function of its place alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slipway.errors import DataError
from slipway.workloads.base import Tensors


@dataclass(frozen=True)
class Numbers:
    """Batches of unequal size whose numbers tell where they belong."""

    steps: int
    pids: Path | None = None
    """A folder where everyone who makes a batch leaves its process id."""
    delay_s: float = 0.0
    slow_from: int = 0
    """Batches before this one are not delayed."""
    kilobytes: int = 1

    def epoch(self, epoch: int, ranks: int) -> Sequence[Tensors]:
        return _Epoch(self, epoch, ranks)

    def made(self, epoch: int, ranks: int, index: int) -> Tensors:
        if self.pids is not None:
            (self.pids / str(os.getpid())).touch()
        if index >= self.slow_from:
            time.sleep(self.delay_s)
        rng = np.random.default_rng([epoch, ranks, index])
        rows = int(rng.integers(1, 8))
        return {
            "at": np.array([epoch, ranks, index]),
            "noise": rng.normal(size=(rows, 16 * self.kilobytes)).astype(np.float32),
            "turned": np.asfortranarray(rng.integers(0, 2, size=(rows, 3)).astype(bool)),
        }


@dataclass(frozen=True)
class Faulty(Numbers):
    """Fails at batch `at` in a way of choice."""

    at: int = 3
    fault: str = ""

    def made(self, epoch: int, ranks: int, index: int) -> Tensors:
        if index == self.at and self.fault == "data":
            raise DataError("photo.jpg: not an image")
        if index == self.at and self.fault == "bug":
            raise KeyError("colour")
        if index == self.at and self.fault == "objects":
            return {"names": np.array(["a", None], dtype=object)}
        if index == self.at and self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().made(epoch, ranks, index)


class _Epoch(Sequence[Tensors]):
    def __init__(self, task: Numbers, epoch: int, ranks: int) -> None:
        self.task, self.epoch, self.ranks = task, epoch, ranks

    def __len__(self) -> int:
        return self.task.steps

    def __getitem__(self, index: Any) -> Any:
        return self.task.made(self.epoch, self.ranks, index)
