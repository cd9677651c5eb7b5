"""A training run from outside: its processes are started, started again when one was killed, and resumed in any number.

What a process does is in trainer.py. On several nodes each runs this with its own share of the processes
(rendezvous.py); the first decides what they go on from. Every process writes its part of a checkpoint and reads what
others wrote, so the folder of the checkpoints has to be one that all nodes see.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import shutil
import uuid
from pathlib import Path

from slipway import artifacts
from slipway.errors import DivergedError, SlipwayError, TransientError
from slipway.params import Section, TrainParams
from slipway.training import checkpoints, processes, rendezvous, trainer
from slipway.training.rendezvous import Node, Team
from slipway.training.state import Job as Job
from slipway.training.state import State as State

FREE = {"world_size", "loader", "profile", "restarts", "checkpoint_every_s", "patience", "device_memory_gb"}
"""Parameters that may change between a run that was killed and the one that goes on from its checkpoints."""

log = logging.getLogger(__name__)


def train(job: Job, node: Node = rendezvous.ALONE) -> State:
    """Train in `job.train.world_size` processes, from the newest whole checkpoint if there is one.

    Waits while another call trains with the same checkpoints. When a process is killed, all are started again from the
    newest checkpoint, at most `job.train.restarts` times. With a `node`, every node of the run calls this.

    The first node writes `weights.npz` (float32 arrays by parameter name, of the best epoch) and `model.json` into
    `job.out`.

    Returns: where the run ended, as the first process of this node knows it.

    Raises:
        SlipwayError: the data are too few, or processes or nodes disagree on what they train.
        DivergedError: the loss is no number any more, or explodes; the last good checkpoint is kept.
        CheckpointError: a whole checkpoint does not fit the model.
        TransientError: a process was killed once more than that, or a node does not come; the next call goes on.
    """
    job.checkpoints.parent.mkdir(parents=True, exist_ok=True)
    with _lock(job.checkpoints, node.rank).open("a") as lock:
        # Held by every process: those of a killed run may outlive it for a moment and must not write meanwhile.
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return _persist(job, node, processes.Held(lock.fileno()))
        except DivergedError as error:
            good = checkpoints.drop(job.checkpoints, error.step)
            kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint from before it"
            raise DivergedError(f"{error}; {kept}", error.step) from error


def _lock(folder: Path, node: int = 0) -> Path:
    return folder.with_suffix(f".{node}.lock")


def _persist(job: Job, node: Node, held: processes.Held) -> State:
    """Train, and start again when a process was killed: with the restarts that are left by the first node's count."""
    left = job.train.restarts
    while True:
        with rendezvous.meet(node, job.train.world_size) as team:
            try:
                left, resume = _begin(job, left, team)
                state: State = processes.run(job.train.world_size, trainer.run, job, resume, held, team=team)
                return state
            except TransientError as error:
                if not left:
                    raise TransientError(
                        f"{error}; started again {job.train.restarts} times (train.restarts); run the stage again: it "
                        "goes on from its last checkpoint"
                    ) from error
                left -= 1
                log.warning("%s; starting again from the last checkpoint, %d restarts left", error, left)


def _begin(job: Job, left: int, team: Team) -> tuple[int, Path | None]:
    """What all nodes begin an attempt with: how many restarts are left, and the checkpoint that they go on from."""

    def decide() -> tuple[int, str | None, str, str]:
        resume, proof = _resume(job), uuid.uuid4().hex
        _lock(job.checkpoints).write_text(proof)
        return left, None if resume is None else resume.name, job.checkpoints.name, proof

    left, name, run, proof = team.agree(decide)
    # By the first node's name of the run: if this node has another one, its processes tell why (agreement).
    seen = _lock(job.checkpoints.with_name(run))
    if not seen.exists() or seen.read_text() != proof:
        raise SlipwayError(
            f"training: node {team.node.rank} does not see node 0's checkpoints in {job.checkpoints.parent}; on "
            "several nodes this has to be a folder that all of them share: set SLIPWAY_HOME to one"
        )
    return left, None if name is None else job.checkpoints / name


def _resume(job: Job) -> Path | None:
    """Find the checkpoint to go on from, made fit for the number of processes."""
    newest = checkpoints.newest(job.checkpoints)
    if newest is not None and _processes(newest) != job.train.world_size:
        log.warning("%s: of %d processes, going on with %d", newest, _processes(newest), job.train.world_size)
        newest = processes.run(1, _convert, newest, job.checkpoints / trainer.UNIVERSAL)
    return newest


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
    with _lock(checkpoints).open("a") as lock:
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
