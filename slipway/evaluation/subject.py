"""A model that is to be scored, wherever it is: in the registry by its number or alias, or in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slipway import package, tracking
from slipway.errors import ModelError
from slipway.package import Package

FP32 = "fp32"


@dataclass(frozen=True)
class Subject:
    """One model in the forms that there are of it."""

    name: str
    """How people call it, such as ranker/3 or a folder."""
    package: Package
    models: Mapping[str, Path]
    """ONNX file by recipe: the full model first, if it was kept, then the one that is served."""


def find(workload: str, reference: str) -> Subject:
    """Find a model by what a user calls it.

    Args:
        workload: whose registered model a number or an alias means.
        reference: a version's number, an alias, or the folder of a package (`models/package`) or of a version.

    Raises:
        ModelError: the folder is no package, or a file of it is corrupt.
        RegistryError: no version bears the number or alias.
    """
    folder = Path(reference)
    if folder.is_dir():
        inner = folder / tracking.PACKAGE
        place = inner if not (folder / package.MANIFEST).exists() and inner.is_dir() else folder
        return _subject(reference, place, [place.parent / tracking.REFERENCE, place.parent / "export" / "fp32.onnx"])
    if "/" in reference or folder.exists():
        raise ModelError(f"{reference}: no folder of a model package; give one, a version's number, or an alias")
    version = tracking.resolve(workload, reference)
    place = tracking.fetch(workload, version)
    name = f"{workload}/{version}" if reference == version else f"{workload}/{version} ({reference})"
    return _subject(name, place / tracking.PACKAGE, [place / tracking.REFERENCE])


def _subject(name: str, folder: Path, full: list[Path]) -> Subject:
    sealed = package.load(folder)
    served = {sealed.recipe: folder / package.MODEL}
    beside = next((path for path in full if path.is_file()), None)
    return Subject(name, sealed, served if beside is None or FP32 in served else {FP32: beside, **served})
