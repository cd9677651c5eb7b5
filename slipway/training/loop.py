"""A training run from outside: its processes are started, started again when one was killed, and resumed in any number.

What a process does is in trainer.py.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import shutil
from pathlib import Path

from slipway import artifacts
from slipway.config import Section, TrainParams
from slipway.errors import DivergedError, TransientError
from slipway.training import checkpoints, processes, trainer
from slipway.training.state import Job as Job
from slipway.training.state import State as State

FREE = {"world_size", "loader", "profile", "restarts", "checkpoint_every_s", "patience", "device_memory_gb"}
"""Parameters that may change between a run that was killed and the one that goes on from its checkpoints."""

log = logging.getLogger(__name__)


def train(job: Job) -> State:
    """Train in `job.train.world_size` processes, from the newest whole checkpoint if there is one.

    Waits while another call trains with the same checkpoints. When a process is killed, all are started again from the
    newest checkpoint, at most `job.train.restarts` times.

    Writes `weights.npz` (float32 arrays by parameter name, of the best epoch) and `model.json` into `job.out`.

    Raises:
        SlipwayError: the data are too few, or processes disagree on what they train.
        DivergedError: the loss is no number any more, or explodes; the last good checkpoint is kept.
        CheckpointError: a whole checkpoint does not fit the model.
        TransientError: a process was killed once more than that; the next call goes on.
    """
    job.checkpoints.parent.mkdir(parents=True, exist_ok=True)
    with job.checkpoints.with_suffix(".lock").open("a") as lock:
        # Held by every process: those of a killed run may outlive it for a moment and must not write meanwhile.
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return _persist(job, processes.Held(lock.fileno()))
        except DivergedError as error:
            good = checkpoints.drop(job.checkpoints, error.step)
            kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint from before it"
            raise DivergedError(f"{error}; {kept}", error.step) from error


def _persist(job: Job, held: processes.Held) -> State:
    """Train, and start again when a process was killed."""
    for left in range(job.train.restarts, 0, -1):
        try:
            return _run(job, held)
        except TransientError as error:
            log.warning("%s; starting again from the last checkpoint, %d restarts left", error, left - 1)
    try:
        return _run(job, held)
    except TransientError as error:
        raise TransientError(
            f"{error}; started again {job.train.restarts} times (train.restarts); run the stage again: it goes on from "
            "its last checkpoint"
        ) from error


def _run(job: Job, held: processes.Held) -> State:
    newest = checkpoints.newest(job.checkpoints)
    if newest is not None and _processes(newest) != job.train.world_size:
        log.warning("%s: of %d processes, going on with %d", newest, _processes(newest), job.train.world_size)
        newest = processes.run(1, _convert, newest, job.checkpoints / trainer.UNIVERSAL)
    state: State = processes.run(job.train.world_size, trainer.run, job, newest, held)
    return state


def _convert(_rank: int, _world_size: int, _meeting: str, folder: Path, out: Path) -> Path:
    """Make a checkpoint fit any number of processes; runs in a process of its own, since it needs DeepSpeed."""
    from slipway.training import snapshots

    if not snapshots.partitioned(folder):
        return folder
    snapshots.convert(folder, out)
    for file in folder.iterdir():
        if file.is_file():
            shutil.copy2(file, out)
    return out


def _processes(checkpoint: Path) -> int:
    """How many processes wrote a checkpoint."""
    return len(list(checkpoint.glob("state-*.json")))


def forget(checkpoints: Path) -> None:
    """Remove the checkpoints of a run that has ended, unless another call of the same run goes on from them."""
    with checkpoints.with_suffix(".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        shutil.rmtree(checkpoints, ignore_errors=True)


def key(workload: str, data: Path, train: TrainParams, model: Section) -> str:
    """Name of a run: equal for equal data, parameters and code, so that a checkpoint never meets another model.

    Parameters that may change on the way (`FREE`) are left out.
    """
    digest = hashlib.sha256(artifacts.sha256(data).encode())
    digest.update(repr((workload, train.model_dump(exclude=FREE), model)).encode())
    here = Path(__file__).parent
    for source in [*sorted(here.glob("*.py")), *sorted((here.parent / "workloads" / workload).glob("*.py"))]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
