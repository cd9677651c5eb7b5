"""A model package: the folder that the registry keeps and a replica loads; whole and unchanged, or refused.

    package.json    what it is: workload, recipe, engine, signature, and the SHA-256 of every other file; written last
    model.onnx      the model, as ONNX whatever the engine
    model.pt2       of an engine that compiles: its code for one kind of processor
    golden.npz      golden inputs and outputs, `input.NAME` and `output.NAME`: what the model must answer
    ...             whatever the workload's endpoint reads, such as the ranker's items.json

`seal` makes a folder a package, `load` verifies it.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipway import artifacts
from slipway.errors import DataError, ModelError

MANIFEST, MODEL, GOLDEN = "package.json", "model.onnx", "golden.npz"
ENGINE = "onnxruntime"  # of a package that names none: one from before there was a choice

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of the model."""

    name: str
    dtype: str
    """NumPy's name of the type, such as int64 or float32."""
    shape: tuple[int | None, ...]
    """Shape with the batch dimension first; None where it varies."""


@dataclass(frozen=True)
class Package:
    """A verified model package."""

    folder: Path
    workload: str
    precision: str
    """Arithmetic of its products: fp32, bf16 or int8."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    recipe: str = ""
    """How it was compressed, such as int8 or prune-50-qat; fp32 for the model as it was trained."""
    engine: str = ENGINE
    """The engine of `slipway.serving.engines` that was the fastest for it where it was sealed."""
    score_deciles: tuple[float, ...] = ()
    """Nine bounds that part the scores of held-out requests into tenths; none: its drift is not watched."""
    files: tuple[str, ...] = (MODEL, GOLDEN)
    """What was sealed, and is as it was."""

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which holds that of every other file."""
        return artifacts.sha256(self.folder / MANIFEST)

    def golden(self) -> tuple[Arrays, Arrays]:
        """Read the golden inputs and the outputs that the model must give for them.

        Raises:
            ModelError: they are no plain tensors; what could hold code, a pickle, is not read.
        """
        try:
            with np.load(self.folder / GOLDEN, allow_pickle=False) as stored:
                return (
                    {k.removeprefix("input."): stored[k] for k in stored.files if k.startswith("input.")},
                    {k.removeprefix("output."): stored[k] for k in stored.files if k.startswith("output.")},
                )
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ModelError(f"{self.folder / GOLDEN}: no archive of plain tensors ({error})") from error


def seal(
    folder: Path,
    workload: str,
    precision: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    golden: tuple[Arrays, Arrays],
    recipe: str = "",
    engine: str = ENGINE,
    score_deciles: tuple[float, ...] = (),
) -> None:
    """Write the golden tensors and, last, the manifest that makes `folder` a package."""
    named = {f"input.{k}": v for k, v in golden[0].items()} | {f"output.{k}": v for k, v in golden[1].items()}
    np.savez(folder / GOLDEN, **named)  # type: ignore[arg-type]  # the stub takes the arrays for allow_pickle
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    artifacts.write_json(
        folder / MANIFEST,
        {
            "workload": workload,
            "precision": precision,
            "recipe": recipe or precision,
            "engine": engine,
            "score_deciles": score_deciles,
            "inputs": [vars(spec) for spec in inputs],
            "outputs": [vars(spec) for spec in outputs],
            "files": {str(path.relative_to(folder)): artifacts.sha256(path) for path in files},
        },
    )


def load(folder: Path) -> Package:
    """Read a package and verify every file against its checksum.

    Raises:
        ModelError: the folder is no package, or a file is missing or not what was sealed; names the file.
    """
    try:
        manifest = artifacts.read_json(folder / MANIFEST)
        files = dict(manifest["files"])
        package = Package(
            folder,
            manifest["workload"],
            manifest["precision"],
            _specs(manifest["inputs"]),
            _specs(manifest["outputs"]),
            manifest.get("recipe", manifest["precision"]),
            manifest.get("engine", ENGINE),
            tuple(float(bound) for bound in manifest.get("score_deciles", ())),
            tuple(files),
        )
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder}: not a model package ({error})") from error
    for name in (MODEL, GOLDEN):
        if name not in files:
            raise ModelError(f"{folder}: not a model package (no {name} in its manifest)")
    for name, checksum in files.items():
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{path}: missing from the model package; register the model again")
        if artifacts.sha256(path) != checksum:
            raise ModelError(f"{path}: corrupt, its SHA-256 is not the one that was sealed; register the model again")
    return package


def _specs(raw: Any) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"])) for spec in raw)
