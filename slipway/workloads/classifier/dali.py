"""JPEGs decoded by a GPU, a batch at once: NVIDIA DALI, where it is installed and a device is there.

    pip install nvidia-dali-cuda120

It is no dependency of slipway: without it, or without a GPU, `decoding.py` does all by itself. `device="cpu"` runs the
same pipeline without a GPU; that is for tests, as it is slower there than `decoding.py`.
"""

# B batch, S side of the square
from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slipway.workloads.classifier.decoding import Pixels

DEVICES = Path("/proc/driver/nvidia/gpus")
LARGEST = 64
"""Pictures of one run of the pipeline."""

log = logging.getLogger(__name__)


@lru_cache
def available() -> bool:
    """Whether DALI can be imported and there is a GPU for it."""
    return any(DEVICES.glob("*")) and installed()


def installed() -> bool:
    """Whether DALI can be imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # there is no package `nvidia` at all
        return False


def decode(files: Sequence[bytes], side: int, device: Literal["mixed", "cpu"] = "mixed") -> list[Pixels | None]:
    """Decode whole, ordinary JPEGs to [S, S, 3] RGB, not yet turned as EXIF asks; None for a batch that it refused."""
    squares: list[Pixels | None] = []
    for at in range(0, len(files), LARGEST):
        batch = [np.frombuffer(data, np.uint8) for data in files[at : at + LARGEST]]
        try:
            pipeline = _pipeline(side, device)
            pipeline.feed_input("files", batch)
            (made,) = pipeline.run()
            made = made.as_cpu() if device == "mixed" else made
            squares += [np.array(made.at(number)) for number in range(len(batch))]
        except RuntimeError as error:  # one that is broken inside spoils its batch, and the pipeline
            log.warning("DALI refused a batch, the processor decodes it: %s", str(error).splitlines()[0])
            _pipeline.cache_clear()
            squares += [None] * len(batch)
    return squares


@lru_cache(maxsize=1)
def _pipeline(side: int, device: str) -> Any:
    from nvidia.dali import Pipeline, fn, types

    # Not pipelined: a batch that is fed is the one that comes back.
    order = {"exec_async": False, "exec_pipelined": False, "prefetch_queue_depth": 1}
    pipeline = Pipeline(LARGEST, num_threads=1, device_id=None if device == "cpu" else 0, **order)
    with pipeline:
        files = fn.external_source(name="files", device="cpu")
        decoded = fn.decoders.image(files, device=device, output_type=types.RGB, adjust_orientation=False)
        square = fn.resize(decoded, resize_x=side, resize_y=side, interp_type=types.INTERP_LINEAR, antialias=True)
        pipeline.set_outputs(square)
    pipeline.build()
    return pipeline
