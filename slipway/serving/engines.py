"""The engines that run a model, and the proof that one runs it right: the package's golden outputs.

Compression and the replica share them: what was measured there is what serves here. A model is ONNX for all of them but
Inductor, whose packages hold it in both forms.
"""

# B batch
from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime

from slipway import package as packages
from slipway.errors import ModelError
from slipway.package import Package
from slipway.serving import inductor
from slipway.workloads.base import Array, Tensors

log = logging.getLogger(__name__)

TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "inductor": "torch.compile"}

MAX_DEVIATION = {"fp32": 0.01, "bf16": 0.05, "int8": 0.1}
"""Mean deviation from the golden floats, in standard deviations of theirs. INT8 kernels round and saturate differently
from one processor to the next, bf16 keeps 8 bits; another model's outputs are off by about 1."""
MASKED = 1e6
"""Scores beyond it are no scores: models mask what they exclude with minus infinity, or with a huge number."""
MIN_OVERLAP = {"fp32": 0.98, "bf16": 0.9, "int8": 0.8}
"""Share of golden ids in a row that must come again, in any order: ties and near ties swap places."""


class Runs(Protocol):
    """What gives a model's answers."""

    def run(self, inputs: Tensors, outputs: Sequence[str]) -> list[Array]:
        """Run one batch: inputs [B, ...] by name; gives the named outputs [B, ...] in order."""


class Engine(Runs, Protocol):
    """A model in an engine. It may be called from any thread; one call at a time is what it is tuned for."""

    name: str
    inputs: list[str]
    outputs: list[str]


@dataclass(frozen=True)
class Source:
    """A serialised model, and what an engine has to know to run it."""

    model: Path | bytes
    """As ONNX, or what the engine takes in its place: a file, or its bytes."""
    label: str
    """What errors call it."""
    precision: str = "fp32"
    """Arithmetic of its products; bf16 is asked of the engine, the others stand in the model."""
    threads: int = 1


class OnnxRuntime:
    """ONNX Runtime on one of its execution providers."""

    def __init__(self, source: Source, name: str, provider: str) -> None:
        self.name = name
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = source.threads, 1
        options.log_severity_level = 3
        # Threads that spin while they wait would take the processor from the event loop and the other replicas.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model = source.model if isinstance(source.model, bytes) else str(source.model)
        providers = list(dict.fromkeys([provider, "CPUExecutionProvider"]))  # the processor takes what it does not know
        self._session = onnxruntime.InferenceSession(model, options, providers=providers)
        self.inputs = [node.name for node in self._session.get_inputs()]
        self.outputs = [node.name for node in self._session.get_outputs()]

    def run(self, inputs: Tensors, outputs: Sequence[str]) -> list[Array]:
        """Run one batch: inputs [B, ...] by name; gives the named outputs [B, ...] in order."""
        results: list[Array] = self._session.run(list(outputs), dict(inputs))
        return results


@lru_cache(maxsize=1)
def _openvino() -> Any:
    """OpenVINO's one core of this process.

    A core puts a signal stack of its own under the thread, and gives back the one before when it goes. Of two that go
    in the order in which they came, the second gives back what the first has unmapped, and the next signal is the end.
    """
    import openvino  # late: optional, and a replica that does not need it should not load it

    return openvino.Core()


class OpenVino:
    """OpenVINO on one of its devices."""

    def __init__(self, source: Source, name: str, device: str) -> None:
        self.name, self._lock = name, threading.Lock()
        model = _openvino().read_model(source.model)
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16" if source.precision == "bf16" else "f32"}
        if device == "CPU":
            # Without pinning: every replica's thread would be pinned to the same first core.
            settings |= {"INFERENCE_NUM_THREADS": source.threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
        self._request = _openvino().compile_model(model, device, settings).create_infer_request()
        self.inputs = [port.get_any_name() for port in model.inputs]
        self.outputs = [port.get_any_name() for port in model.outputs]

    def run(self, inputs: Tensors, outputs: Sequence[str]) -> list[Array]:
        """Run one batch: inputs [B, ...] by name; gives the named outputs [B, ...] in order."""
        with self._lock:
            found = self._request.infer(dict(inputs), share_inputs=True)
            return [np.asarray(found[name]) for name in outputs]


def _inductor(source: Source, _name: str, _device: str) -> Engine:
    """torch.compile's code, in torch."""
    return inductor.Inductor(source.model, source.threads)


@dataclass(frozen=True)
class Kind:
    """An engine that there may be, by the name that params and packages call it."""

    make: Callable[[Source, str, str], Engine]
    target: str
    """The execution provider or device."""
    remedy: str
    """What to do where it is absent."""
    file: str = packages.MODEL
    """What it loads of a package."""


_GPU = "install onnxruntime-gpu in place of onnxruntime, on a machine with an NVIDIA device"
KINDS: Mapping[str, Kind] = {
    "onnxruntime": Kind(OnnxRuntime, "CPUExecutionProvider", "install onnxruntime"),
    "openvino": Kind(OpenVino, "CPU", "pip install 'slipway[openvino]'"),
    "cuda": Kind(OnnxRuntime, "CUDAExecutionProvider", _GPU),
    "tensorrt": Kind(OnnxRuntime, "TensorrtExecutionProvider", _GPU + " and TensorRT"),
    "npu": Kind(OpenVino, "NPU", "pip install 'slipway[openvino]', on a machine with an NPU and its driver"),
    "inductor": Kind(_inductor, "cpu", "pip install the torch that the model was compiled by", inductor.FILE),
}
COMPILED = "inductor"
"""The engine whose model is code: it runs where it is asked for by its name, never because a package names it."""


def absent(name: str) -> str:
    """Say why an engine is not here, and what to do; nothing if it is."""
    kind = KINDS.get(name)
    if kind is None:
        return f"there is no engine {name}; there are: {', '.join(KINDS)}"
    try:
        there = _targets(kind)
    except ImportError as error:
        return f"{name} is not here ({error}): {kind.remedy}"
    if kind.target in there:
        return ""
    return f"{name} is not here (no {kind.target} among {', '.join(there)}): {kind.remedy}"


def _targets(kind: Kind) -> Sequence[str]:
    """Devices or execution providers that an engine's library finds."""
    if kind.make is _inductor:
        if missing := inductor.absent():
            raise ImportError(missing)
        return [kind.target]
    devices: Sequence[str] = (
        _openvino().available_devices if kind.make is OpenVino else onnxruntime.get_available_providers()
    )
    return devices


def make(name: str, source: Source) -> Engine:
    """Load a model into an engine.

    Raises:
        ModelError: the engine is not here, or cannot load the model; says which and why.
    """
    missing = absent(name)
    if missing:
        raise ModelError(f"{source.label}: {missing}")
    kind = KINDS[name]
    try:
        return kind.make(source, name, kind.target)
    except Exception as error:  # the engines' own errors have no base but this
        raise ModelError(f"{source.label}: {TITLES.get(name, name)} cannot load it ({_first_line(error)})") from error


def of(package: Package, threads: int, wanted: str = "auto") -> Engine:
    """Load a package into the engine that is wanted, else that it was sealed for, else ONNX Runtime.

    What only a package asks for is data: code, `COMPILED`, is run where it is wanted.

    Raises:
        ModelError: the engine cannot load it, or it has not the inputs and outputs that its manifest declares.
    """
    for name in dict.fromkeys([wanted, package.engine, packages.ENGINE]):
        if name != "auto":
            reason = _unfit(name, package, wanted)
            if not reason:
                break
            log.warning("%s: %s; another engine serves it", package.folder, reason)
    path = package.folder / KINDS[name].file
    made = make(name, Source(path, str(path), package.precision, threads))
    declared = {spec.name for spec in (*package.inputs, *package.outputs)}
    found = {*made.inputs, *made.outputs}
    if not declared <= found:
        raise ModelError(f"{path}: has no {', '.join(sorted(declared - found))}, which its manifest declares")
    return made


def _unfit(name: str, package: Package, wanted: str) -> str:
    """Say why an engine does not serve a package; nothing if it may."""
    if name == COMPILED and wanted != COMPILED:
        return f"it was sealed for {name}, whose model is code: it runs where serve.engine is {name}"
    if missing := absent(name):
        return missing
    file = KINDS[name].file
    return "" if file in package.files else f"has no {file}, which {name} runs: it was sealed for {package.engine}"


def verify(engine: Runs, package: Package) -> None:
    """Run the golden inputs.

    Raises:
        ModelError: an output is not the golden one; names it and how far off it is.
    """
    inputs, golden = package.golden()
    try:
        found = dict(zip(golden, engine.run(inputs, list(golden)), strict=True))
    except Exception as error:  # the engines' own errors have no base but this
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
