"""The engine that runs a model, and the proof that it runs it right: the package's golden outputs."""

# B batch
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime

from slipway import package as packages
from slipway.errors import ModelError
from slipway.package import Package
from slipway.workloads.base import Array, Tensors

MAX_DEVIATION = {"fp32": 0.01, "int8": 0.1}
"""Mean deviation from the golden floats, in standard deviations of theirs. INT8 kernels round and saturate differently
from one processor to the next; another model's outputs are off by about 1."""
MASKED = 1e6
"""Scores beyond it are no scores: models mask what they exclude with minus infinity, or with a huge number."""
MIN_OVERLAP = {"fp32": 0.98, "int8": 0.8}
"""Share of golden ids in a row that must come again, in any order: ties and near ties swap places."""


class OnnxEngine:
    """ONNX Runtime on the CPU. `run` may be called from any thread, one call at a time is what it is tuned for."""

    def __init__(self, package: Package, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        # Threads that spin while they wait would take the processor from the event loop and the other replicas.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = package.folder / packages.MODEL
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no base but this
            raise ModelError(f"{path}: ONNX Runtime cannot load it ({_first_line(error)})") from error
        self._fetching = onnxruntime.RunOptions()
        self._fetching.only_execute_path_to_fetches = True  # what no request asked for is not computed
        declared = {spec.name for spec in (*package.inputs, *package.outputs)}
        found = {node.name for node in (*self._session.get_inputs(), *self._session.get_outputs())}
        if not declared <= found:
            raise ModelError(f"{path}: has no {', '.join(sorted(declared - found))}, which its manifest declares")

    def run(self, inputs: Tensors, outputs: Sequence[str]) -> list[Array]:
        """Run one batch: inputs [B, ...] by name; gives the named outputs [B, ...] in order."""
        results: list[Array] = self._session.run(list(outputs), inputs, self._fetching)
        return results


class Runs(Protocol):
    """What gives a model's answers."""

    def run(self, inputs: Tensors, outputs: Sequence[str]) -> list[Array]:
        """Run one batch: inputs [B, ...] by name; gives the named outputs [B, ...] in order."""


def verify(engine: Runs, package: Package) -> None:
    """Run the golden inputs.

    Raises:
        ModelError: an output is not the golden one; names it and how far off it is.
    """
    inputs, golden = package.golden()
    try:
        found = dict(zip(golden, engine.run(inputs, list(golden)), strict=True))
    except Exception as error:  # ONNX Runtime's errors have no base but this
        raise ModelError(f"{package.folder}: the golden inputs do not run ({_first_line(error)})") from error
    for name, expected in golden.items():
        fault = _fault(found[name], expected, package.precision)
        if fault:
            raise ModelError(
                f"{package.folder}: output {name} is not the golden one ({fault}); this engine would answer wrongly: "
                "register the model again"
            )


def _fault(found: Array, expected: Array, precision: str) -> str:
    """Say what is wrong with an output, or nothing."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype}{list(found.shape)} instead of {expected.dtype}{list(expected.shape)}"
    if not expected.size:
        return ""
    if expected.dtype.kind != "f":
        overlap = _overlap(found, expected)
        least = MIN_OVERLAP.get(precision, MIN_OVERLAP["int8"])
        return "" if overlap >= least else f"{overlap:.1%} of the values agree, at least {least:.0%} must"
    deviation = _deviation(found.astype(np.float64), expected.astype(np.float64))
    most = MAX_DEVIATION.get(precision, MAX_DEVIATION["int8"])
    return "" if deviation <= most else f"off by {deviation:.3g} standard deviations, at most {most} is allowed"


def _overlap(found: Array, expected: Array) -> float:
    rows = zip(found.reshape(len(found), -1), expected.reshape(len(expected), -1), strict=True)
    return float(np.mean([np.isin(wanted, got).mean() for got, wanted in rows]))


def _deviation(found: Array, expected: Array) -> float:
    """Mean distance in standard deviations of what is expected; infinite if other values are masked, or not numbers."""
    real = np.abs(expected) < MASKED
    if not np.array_equal(real, np.abs(found) < MASKED):
        return float("inf")
    if not real.any():
        return 0.0
    spread = max(float(expected[real].std()), 1e-6)
    return float(np.abs(found[real] - expected[real]).mean()) / spread


def _first_line(error: Any) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
