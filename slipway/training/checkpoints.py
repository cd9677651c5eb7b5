"""Checkpoints of a training run: whole and unchanged, or not used.

    FOLDER/step-00000120/    engine/ (DeepSpeed's files), best.npz, state.json, manifest.json (SHA-256 of the others)

A checkpoint is written beside under a hidden name, its manifest last, and renamed. Two are kept, so that a torn one
leaves another to go on from.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from slipway import artifacts
from slipway.errors import DataError

MANIFEST = "manifest.json"
KEPT = 2

log = logging.getLogger(__name__)


def newest(folder: Path) -> Path | None:
    """Find the newest checkpoint that is whole; those that are not are removed, with a warning."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        wrong = _wrong(path)
        if wrong is None:
            return path
        log.warning("%s: %s; not used, training goes on from an earlier one or starts again", path, wrong)
        shutil.rmtree(path, ignore_errors=True)
    return None


def drop(folder: Path, step: int) -> Path | None:
    """Remove the checkpoints of `step` steps and more, which a bad step was built on or followed; the newest left.

    A step shows only in the one after it whether it was good: those before `step` have proved it.
    """
    for path in folder.glob("step-*"):
        if int(path.name.removeprefix("step-")) >= step:
            shutil.rmtree(path, ignore_errors=True)
    return max(folder.glob("step-*"), default=None)


def write(folder: Path, step: int, lead: bool, fill: Callable[[Path], None], barrier: Callable[[], None]) -> None:
    """Write a checkpoint; every process calls this.

    Args:
        folder: where the checkpoints of the run lie.
        step: optimizer steps done.
        lead: whether this is rank 0, which makes and seals the folder.
        fill: writes this process's files into the path it is given.
        barrier: returns when all processes have called it.
    """
    path, beside = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    if lead:
        for left in folder.glob(".step-*.tmp"):
            shutil.rmtree(left)
        beside.mkdir(parents=True)
    barrier()
    fill(beside)
    barrier()
    if lead:
        files = sorted(p for p in beside.rglob("*") if p.is_file())
        sums = {str(p.relative_to(beside)): artifacts.sha256(p) for p in files}
        artifacts.write_json(beside / MANIFEST, sums)
        shutil.rmtree(path, ignore_errors=True)
        beside.rename(path)
        for old in sorted(folder.glob("step-*"))[:-KEPT]:
            shutil.rmtree(old)


def _wrong(path: Path) -> str | None:
    try:
        sums = artifacts.read_json(path / MANIFEST)
    except DataError as error:
        return str(error)
    for name, checksum in sums.items():
        part = path / name
        if not part.is_file() or artifacts.sha256(part) != checksum:
            return f"{name} is missing or torn"
    return None
