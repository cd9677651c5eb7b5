"""Checkpoints of a training run: whole and unchanged, or not used; written behind the training.

    FOLDER/step-00000120/    the files of every process, manifest.json (SHA-256 of each)

Training stands still only while its state is copied in memory. A thread of each process then writes its files beside,
under a hidden name; when all have, the manifest is written last and the folder renamed. A checkpoint that cannot be
written, for want of space perhaps, is told and given up: training goes on. Two are kept, so that a torn one leaves
another to go on from.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from slipway import artifacts
from slipway.errors import DataError

MANIFEST = "manifest.json"
KEPT = 2

Files = Mapping[str, Callable[[Path], object]]
"""What a process writes: by the path within the checkpoint, a function that writes the file from memory."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """What one process wrote of a checkpoint."""

    sums: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each file."""
    error: str = ""
    """Why it could not, if so."""


def newest(folder: Path) -> Path | None:
    """Find the newest checkpoint that is whole; those that are not are removed, with a warning.

    Nobody may be writing: what a killed process left half written is removed too.
    """
    for left in folder.glob(".*"):
        shutil.rmtree(left, ignore_errors=True)
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


def beside(folder: Path, step: int) -> Path:
    """Path of a checkpoint while it is written."""
    return folder / f".step-{step:08d}.tmp"


class Writer:
    """Writes the checkpoints of one process behind its training, one at a time; every process has one.

    Args:
        folder: where the checkpoints of the run lie.
        lead: whether this is rank 0, which seals them.
        exchange: gives each process what all of them wrote; called in a thread, beside the training.
    """

    def __init__(self, folder: Path, lead: bool, exchange: Callable[[Written], Sequence[Written]]) -> None:
        self.folder, self.lead, self.exchange = folder, lead, exchange
        self.thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written: on rank 0, by any process."""
        return self.thread is not None and self.thread.is_alive()

    def write(self, step: int, files: Files) -> None:
        """Start to write a checkpoint; every process calls this at the same step.

        Waits for the one before: at most one is in memory.
        """
        self.wait()
        self.thread = threading.Thread(target=self._write, args=(step, files), name=f"checkpoint {step}")
        self.thread.start()

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self.thread is not None:
            self.thread.join()

    def _write(self, step: int, files: Files) -> None:
        began, path = time.monotonic(), beside(self.folder, step)
        try:
            mine = Written({name: _put(path / name, fill) for name, fill in files.items()})
        except Exception as error:  # noqa: BLE001  # told by rank 0, with those of the others
            mine = Written(error=f"{type(error).__name__}: {error}")
        try:
            written = self.exchange(mine)
        except RuntimeError as error:  # a process is gone, so the others are about to be ended
            log.warning("%s: not finished (%s)", path, error)
            return
        if self.lead:
            try:
                self._seal(step, written)
                log.info("checkpoint at step %d written in %.1f s", step, time.monotonic() - began)
            except OSError as error:
                shutil.rmtree(path, ignore_errors=True)
                log.error(
                    "%s: the checkpoint of step %d could not be written (%s); training goes on, a killed run would "
                    "go on from an earlier one: make room",
                    self.folder,
                    step,
                    error,
                )

    def _seal(self, step: int, written: Sequence[Written]) -> None:
        path, final = beside(self.folder, step), self.folder / f"step-{step:08d}"
        for rank, one in enumerate(written):
            if one.error:
                raise OSError(f"rank {rank}: {one.error}")
        sums = {name: checksum for one in written for name, checksum in one.sums.items()}
        for part in sorted(
            p for p in path.rglob("*") if p.is_file()
        ):  # DeepSpeed copies those of a disk offload itself
            sums.setdefault(str(part.relative_to(path)), artifacts.sha256(part))
        artifacts.write_json(path / MANIFEST, sums)
        _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        path.rename(final)
        _sync(self.folder)
        for old in sorted(self.folder.glob("step-*"))[:-KEPT]:
            shutil.rmtree(old)


def _put(path: Path, fill: Callable[[Path], object]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    fill(path)
    _sync(path)
    return artifacts.sha256(path)


def _sync(path: Path) -> None:
    """Wait until a file or folder would outlive a loss of power."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _wrong(path: Path) -> str | None:
    try:
        sums = artifacts.read_json(path / MANIFEST)
    except DataError as error:
        return str(error)

    def torn(name: str) -> bool:
        return not (path / name).is_file() or artifacts.sha256(path / name) != sums[name]

    with ThreadPoolExecutor() as pool:
        for name, bad in zip(sums, pool.map(torn, sums), strict=True):
            if bad:
                return f"{name} is missing or torn"
    return None
