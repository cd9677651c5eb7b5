"""Peak memory of a model in a process of its own: `python -m slipway.compression.memory MODEL INPUTS ENGINE PRECISION`.

Prints the peak before the model is loaded (interpreter and engine) and at the end, in bytes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from slipway.errors import ModelError
from slipway.serving import engines
from slipway.workloads.base import Tensors

RUNS = 5
LIMIT_S = 300.0


def measure(model: bytes, on: str, precision: str, inputs: Tensors) -> tuple[int, int]:
    """Peak bytes of a process that runs `model` on `inputs`, and how many of them it was without the model.

    Raises:
        ModelError: the process failed.
    """
    with tempfile.TemporaryDirectory(prefix="slipway-memory-") as folder:
        place, given = Path(folder) / "model", Path(folder) / "inputs.npz"
        place.write_bytes(model)
        np.savez(given, **inputs)  # type: ignore[arg-type]  # the stub takes them for allow_pickle
        command = [sys.executable, "-m", __name__, str(place), str(given), on, precision]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    if done.returncode != 0:
        raise ModelError(
            f"peak memory of a {precision} model in {on}: its process failed: {done.stderr.strip()[-300:]}"
        )
    before, peak = done.stdout.split()
    return int(peak), int(before)


def _peak() -> int:
    # Not getrusage: that peak is inherited from the process that started this one.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main(model: str, given: str, on: str, precision: str) -> None:
    """Load, run, print."""
    if engines.absent(on):  # loads the engine's library, too
        raise SystemExit(engines.absent(on))
    before = _peak()
    with np.load(given, allow_pickle=False) as stored:
        inputs = dict(stored)
    made = engines.make(on, engines.Source(Path(model), model, precision))
    for _ in range(RUNS):
        made.run(inputs, made.outputs)
    print(before, _peak())


if __name__ == "__main__":
    main(*sys.argv[1:])
