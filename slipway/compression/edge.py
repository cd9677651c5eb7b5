"""Edge packages: a model in the format of ONNX Runtime Mobile, with all that a device needs to answer with it.

    model.ort           the model, its graph optimised and laid out so that loading parses nothing (FlatBuffers)
    operators.config    the operators and types in it: what a runtime that is built for this model alone must hold
    golden.npz, ...     golden inputs and outputs, and what the workload's endpoint reads, as in the model's package
    run.py              runs it, with onnxruntime and numpy alone
    edge.json           what it is, and the SHA-256 of every other file; written last

https://onnxruntime.ai/docs/performance/model-optimizations/ort-format-models.html
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from slipway import artifacts, package
from slipway.compression import edge_run
from slipway.errors import ModelError
from slipway.package import Package
from slipway.serving import engines
from slipway.workloads.base import Array, Tensors

MODEL, OPERATORS, RUNNER, MANIFEST = "model.ort", "operators.config", "run.py", "edge.json"
LIMIT_S = 120.0  # of one run on the golden inputs


@dataclass(frozen=True)
class Figures:
    """What a model costs in a process that has nothing but the runtime."""

    size_bytes: int
    start_ms: float
    """From the start of the process to its end: interpreter, libraries, model, answers."""
    load_ms: float
    p50_ms: float
    """Of one sample, one thread."""
    peak_mb: float
    model_mb: float
    """Of the peak, what came after the libraries were loaded."""


def write(sealed: Package, model: Path, folder: Path) -> None:
    """Make `folder` an edge package of a model.

    Args:
        sealed: the package whose inputs, golden answers and workload files go along.
        model: the ONNX file that becomes `model.ort`.
        folder: is made.
    """
    folder.mkdir(parents=True)
    convert(model, folder / MODEL)
    _write_operators(folder)
    for name in _companions(sealed):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sealed.folder / name, folder / name)
    shutil.copyfile(edge_run.__file__, folder / RUNNER)
    about = {key: value for key, value in asdict(sealed).items() if key != "folder"}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    about["files"] = {str(path.relative_to(folder)): artifacts.sha256(path) for path in files}
    artifacts.write_json(folder / MANIFEST, about)


def convert(model: Path, out: Path) -> None:
    """Write an ONNX model in the runtime's own format, optimised for any processor.

    Raises:
        ModelError: the runtime cannot load it.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(out)
    # The next level lays convolutions out for the processor at hand, which is not the device's.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.save_model_format", "ORT")
    try:
        ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions share no base but Exception
        raise ModelError(
            f"{model}: ONNX Runtime cannot convert it ({error}); run `python -m tasks.compress`"
        ) from error


def _write_operators(folder: Path) -> None:
    from onnxruntime.tools.ort_format_model import create_config_from_models

    logging.getLogger("ort_format_model").setLevel(logging.WARNING)
    create_config_from_models([folder / MODEL], folder / OPERATORS, enable_type_reduction=True)
    lines = (folder / OPERATORS).read_text().splitlines(keepends=True)
    (folder / OPERATORS).write_text("".join(line for line in lines if not line.startswith("#")))  # it names the folder


def _companions(sealed: Package) -> list[str]:
    """Files of a package that go along: all but the model, which is converted, and the manifest, which is made anew."""
    files = (path.relative_to(sealed.folder) for path in sealed.folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in files if str(path) not in {package.MODEL, package.MANIFEST})


def measure(folder: Path, golden: Package | None) -> Figures:
    """Run an edge package in a process of its own, without the training stack.

    Args:
        folder: the edge package.
        golden: the package whose golden answers it must give; None: it may answer otherwise.

    Raises:
        ModelError: it does not run, answers otherwise, or loads more than the runtime; says which.
    """
    with tempfile.TemporaryDirectory(prefix="slipway-") as scratch:
        answers = Path(scratch) / "answers.npz"
        began = time.perf_counter()
        told = _run(folder, answers)
        took = (time.perf_counter() - began) * 1e3
        if golden is not None:
            engines.verify(_Answered(answers), golden)
    if told["training_stack"]:
        raise ModelError(f"{folder}: running it loaded {', '.join(told['training_stack'])}")
    size = (folder / MODEL).stat().st_size
    model_mb = round(told["peak_mb"] - told["base_mb"], 3)
    return Figures(size, round(took, 1), told["load_ms"], told["p50_ms"], told["peak_mb"], model_mb)


def _run(folder: Path, answers: Path) -> dict[str, Any]:
    # Isolated: neither this checkout nor the environment's paths are seen, as on a device.
    command = [sys.executable, "-I", str(folder / RUNNER), "--answers", str(answers)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{folder}: no answer within {LIMIT_S:g} s") from error
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        raise ModelError(f"{folder}: run.py ended with {ended.returncode}: {last}")
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


class _Answered:
    """An engine whose answers were given elsewhere."""

    def __init__(self, answers: Path) -> None:
        with np.load(answers, allow_pickle=False) as stored:
            self._answers = {name: stored[name] for name in stored.files}

    def run(self, inputs: Tensors, outputs: Sequence[str]) -> list[Array]:
        """Give the answers to the golden inputs."""
        return [self._answers[name] for name in outputs]
