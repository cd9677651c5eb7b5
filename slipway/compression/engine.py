"""Engines for offline work: a function of names and inputs, one thread; and how fast models are, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from slipway import package
from slipway.errors import ModelError
from slipway.serving import engines
from slipway.workloads.base import Array, Tensors

Run = Callable[[Sequence[str] | None, Tensors], Sequence[Array]]

WARMUP_RUNS = 5


def load(model: bytes, name: str, threads: int = 1, on: str = package.ENGINE, precision: str = "fp32") -> Run:
    """Load a serialised ONNX model: a function of output names (None: all) and inputs.

    Args:
        model: the bytes.
        name: what errors call it.
        threads: of the engine.
        on: name of the engine.
        precision: fp32, bf16 or int8.

    Raises:
        ModelError: the bytes are no model that the engine can run; `name` says which.
    """
    try:
        made = engines.make(on, engines.Source(model, name, precision, threads))
    except ModelError as error:
        raise ModelError(f"{error}; run `python -m tasks.compress`") from error
    return of(made)


def of(made: engines.Runs) -> Run:
    """An engine as a function of output names (None: all, where it tells them) and inputs."""

    def run(outputs: Sequence[str] | None, inputs: Tensors) -> Sequence[Array]:
        return made.run(inputs, getattr(made, "outputs", ()) if outputs is None else outputs)

    return run


def latencies_ms(
    runs: Mapping[str, Run], outputs: Sequence[str], requests: Sequence[Tensors]
) -> dict[str, npt.NDArray[np.float64]]:
    """Time every model on every request, in turn, so that a busy machine is equally busy for all: ms."""
    for inputs in requests[:WARMUP_RUNS]:
        for run in runs.values():
            run(outputs, inputs)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for inputs in requests:
        for name, run in runs.items():
            began = time.perf_counter()
            run(outputs, inputs)
            taken[name].append((time.perf_counter() - began) * 1e3)
    return {name: np.array(values) for name, values in taken.items()}


def ranges(probe: Run, names: Sequence[str], batches: Sequence[Tensors]) -> dict[str, tuple[float, float]]:
    """Least and largest value of each probed tensor over all batches.

    Args:
        probe: a model whose outputs `range.NAME` are [2]: least, largest.
        names: the NAMEs.
        batches: calibration inputs.
    """
    found = np.array([probe([f"range.{name}" for name in names], batch) for batch in batches])  # [batches, names, 2]
    return {name: (float(found[:, i, 0].min()), float(found[:, i, 1].max())) for i, name in enumerate(names)}
