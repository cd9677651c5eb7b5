"""Runs a model where there is no training stack: this file travels in an edge package and needs two libraries alone.

    pip install onnxruntime numpy
    python run.py [--answers FILE]

Loads model.ort beside it, answers the inputs in golden.npz, and prints as JSON how long that took and how much memory:
`import_ms` the two libraries, `load_ms` the model, `first_ms` the first answer, `p50_ms` the median of others (one
thread), `peak_mb` the process at its largest, `base_mb` before the model was loaded. `--answers` writes the outputs.
"""

import argparse
import json
import sys
import time
from pathlib import Path

BEGAN = time.perf_counter()

import numpy as np  # noqa: E402  # what importing costs on the device is measured
import onnxruntime  # noqa: E402

RUNS = 50


def megabytes(key: str) -> float:
    """A figure of this process's memory from the kernel."""
    with Path("/proc/self/status").open() as status:
        return next((int(line.split()[1]) / 1024 for line in status if line.startswith(f"{key}:")), 0.0)


def main() -> None:
    """Load, answer, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=Path, help="file that the outputs are written into (.npz)")
    options = parser.parse_args()
    imported, base = time.perf_counter(), megabytes("VmRSS")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = 1, 1
    here = Path(__file__).resolve().parent
    session = onnxruntime.InferenceSession(str(here / "model.ort"), settings, providers=["CPUExecutionProvider"])
    loaded = time.perf_counter()
    with np.load(here / "golden.npz", allow_pickle=False) as stored:
        golden = {name: stored[name] for name in stored.files}
    inputs = {name.removeprefix("input."): each for name, each in golden.items() if name.startswith("input.")}
    outputs = [name.removeprefix("output.") for name in golden if name.startswith("output.")]
    began = time.perf_counter()
    answers = session.run(outputs, inputs)
    took = [time.perf_counter() - began]
    one = {name: each[:1] for name, each in inputs.items()}
    for _ in range(RUNS):
        began = time.perf_counter()
        session.run(outputs, one)
        took.append(time.perf_counter() - began)
    if options.answers:
        np.savez(options.answers, **dict(zip(outputs, answers, strict=True)))
    figures = {
        "import_ms": (imported - BEGAN) * 1e3,
        "load_ms": (loaded - imported) * 1e3,
        "first_ms": took[0] * 1e3,
        "p50_ms": float(np.median(took[1:])) * 1e3,
        "base_mb": base,
        "peak_mb": megabytes("VmHWM"),
    }
    training = sorted({"torch", "deepspeed", "onnx"} & sys.modules.keys())
    print(json.dumps({**{name: round(value, 3) for name, value in figures.items()}, "training_stack": training}))


if __name__ == "__main__":
    main()
