"""The trained model between stages: `models/trained`, which `train` writes and `compress` begins with."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipway import artifacts
from slipway.errors import ModelError

WEIGHTS, MODEL = "weights.npz", "model.json"

Arrays = Mapping[str, NDArray[Any]]


def write(folder: Path, workload: str, weights: Arrays, about: Mapping[str, Any]) -> None:
    """Write a trained model.

    Args:
        folder: where to; made if it is absent.
        workload: whose model it is.
        weights: arrays by parameter name.
        about: what the workload has to know of it, as JSON takes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save(weights, folder / WEIGHTS)
    artifacts.write_json(folder / MODEL, {"workload": workload, **about})


def read(folder: Path, workload: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read a trained model: its weights by parameter name, and what the workload told of it.

    Raises:
        DataError: there is none.
        ModelError: it is torn, or another workload's.
    """
    about = artifacts.read_json(folder / MODEL)
    if about.get("workload") != workload:
        raise ModelError(
            f"{folder}: a model of the workload {about.get('workload')}, not {workload}; run `python -m tasks.train`"
        )
    try:
        with (folder / WEIGHTS).open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return dict(stored), about
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ModelError(f"{folder / WEIGHTS}: torn or no model ({error}); run `python -m tasks.train`") from error


def save(arrays: Arrays, path: Path) -> None:
    """Write arrays by name into one file."""
    np.savez(path, **arrays)  # type: ignore[arg-type]  # the stub takes them for allow_pickle
