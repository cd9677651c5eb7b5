"""Checkpoints: written behind the training, whole or not used, and good for any number of processes."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from slipway import artifacts
from slipway.errors import CheckpointError, TransientError
from slipway.training import checkpoints, loop, order, precision, processes, snapshots, trainer
from slipway.workloads.ranker.training import RankerTask
from tests.conftest import until
from tests.training.conftest import Whole
from tests.training.test_loop import MODEL, job, weights


def writer(folder: Path) -> checkpoints.Writer:
    return checkpoints.Writer(folder, True, lambda mine: [mine])


def put(folder: Path, step: int) -> None:
    one = writer(folder)
    one.write(step, {"a": lambda path: path.write_bytes(b"whole")})
    one.wait()


def test_a_checkpoint_that_is_torn_is_not_used_and_the_one_before_is(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        put(tmp_path, step)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]
    (tmp_path / "step-00000003" / "a").write_bytes(b"torn")
    assert checkpoints.newest(tmp_path) == tmp_path / "step-00000002"
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    assert checkpoints.newest(tmp_path) is None


def test_a_full_disk_is_told_and_the_checkpoint_before_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, 1)
    one = writer(tmp_path)
    one.write(2, {"a": lambda _: Path("/dev/full").write_bytes(b"no room")})
    one.wait()
    (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert f"{tmp_path}: the checkpoint of step 2 could not be written (rank 0: OSError: [Errno 28] No space" in told
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    put(tmp_path, 3)
    assert checkpoints.newest(tmp_path) == tmp_path / "step-00000003"


def test_the_training_does_not_wait_for_the_disk_but_a_second_checkpoint_does(tmp_path: Path) -> None:
    free, running = threading.Event(), []

    def slow(path: Path) -> None:
        running.append(threading.active_count())
        free.wait(60)
        path.write_bytes(b"whole")

    one = writer(tmp_path)
    one.write(1, {"a": slow})
    assert one.busy
    assert checkpoints.newest(tmp_path / "elsewhere") is None
    assert not list(tmp_path.glob("step-*"))
    second = threading.Thread(target=one.write, args=(2, {"a": slow}))
    until(lambda: running)
    second.start()
    time.sleep(0.2)
    assert len(running) == 1, "two checkpoints are written at once"
    free.set()
    second.join()
    one.wait()
    assert len(list(tmp_path.glob("step-*"))) == 2


def _killed_while_it_writes(_rank: int, _world_size: int, _meeting: str, folder: Path) -> None:
    def half(path: Path) -> None:
        path.write_bytes(b"who")
        os.kill(os.getpid(), signal.SIGKILL)

    put(folder, 1)
    one = writer(folder)
    one.write(2, {"a": lambda path: path.write_bytes(b"whole") and None, "b": half})
    one.wait()


def test_a_kill_in_the_midst_of_writing_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    with pytest.raises(TransientError, match="SIGKILL"):
        processes.run(1, _killed_while_it_writes, tmp_path)
    assert (tmp_path / ".step-00000002.tmp" / "b").exists()
    assert checkpoints.newest(tmp_path) == tmp_path / "step-00000001"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_snapshot_does_not_change_with_what_it_was_taken_of() -> None:
    whole, odd = torch.arange(8.0), torch.Generator().manual_seed(1)
    state = OrderedDict(part=whole[2:4], many=[(whole, 1)], odd=odd)
    copy = snapshots.copied(state)
    whole.zero_()
    odd.manual_seed(2)
    assert copy["part"].tolist() == [2.0, 3.0]
    assert copy["part"].untyped_storage().nbytes() == 8, "a view drags along all that it is a view of"
    assert copy["many"][0][0].tolist() == list(range(8))
    assert copy["odd"].initial_seed() == 1


@contextmanager
def training(one: loop.Job) -> Iterator[Future[loop.State]]:
    """Train in a thread, as the stage would: its processes are the forkserver's children."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(loop.train, one)


def rank(number: int, after: int = 0) -> int:
    """Wait for a process of the training and give its id, another one than `after`."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, _, rest = path.read_text().partition(" ")
            except OSError:
                continue
            name, _, tail = rest[1:].rpartition(") ")
            ours = int(tail.split()[1]) == forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
            if ours and name == f"slipway rank {number}" and int(pid) != after and tail[0] != "Z":
                return int(pid)
        time.sleep(0.005)
    raise AssertionError(f"no rank {number} came up")


def wait_for(folder: Path, count: int) -> None:
    until(lambda: len(list(folder.glob("step-*"))) >= count)


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_the_end_is_bit_for_bit_the_same(
    whole: Whole, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = job(tmp_path)
    with training(mine) as ended:
        wait_for(mine.checkpoints, 2)
        os.kill(rank(1), signal.SIGKILL)
        state = ended.result()
    assert "rank 1 ended with SIGKILL" in caplog.text
    assert "starting again from the last checkpoint, 1 restarts left" in caplog.text
    assert [(p.loss, p.metric) for p in state.curve] == [(p.loss, p.metric) for p in whole.state.curve]
    assert weights(mine.out) == weights(whole.job.out)


def test_processes_that_are_killed_each_time_are_not_started_for_ever(tmp_path: Path) -> None:
    with training(job(tmp_path, restarts=1)) as ended:
        first = rank(1)
        os.kill(first, signal.SIGKILL)
        os.kill(rank(1, after=first), signal.SIGKILL)
        with pytest.raises(TransientError, match=r"rank 1 ended with SIGKILL.*; started again 1 times"):
            ended.result()


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_a_killed_run_goes_on_with_another_number_of_processes_and_sees_every_sample_once(
    tmp_path: Path, before: int, after: int
) -> None:
    mine = job(tmp_path, world_size=before, restarts=0, epochs=3, batch_size=32)
    with training(mine) as ended:
        wait_for(mine.checkpoints, 2)
        os.kill(rank(0), signal.SIGKILL)
        with pytest.raises(TransientError, match="rank 0 ended with SIGKILL"):
            ended.result()
    newest = checkpoints.newest(mine.checkpoints)
    assert newest is not None
    then = artifacts.read_json(newest / "state-0.json")
    turned = mine.train.model_copy(update={"world_size": after, "checkpoint_every_s": 60.0})
    state = loop.train(replace(mine, train=turned))
    count = len(RankerTask(mine.data, mine.train, MODEL).epoch(0, before))
    left = math.ceil((count - then["seen"]) / after) + (2 - then["epoch"]) * math.ceil(count / after)
    assert state.step == then["step"] + left
    assert [point.epoch for point in state.curve] == [1, 2, 3]
    assert [point.loss for point in state.curve] == sorted((point.loss for point in state.curve), reverse=True)
    assert not (mine.checkpoints / trainer.UNIVERSAL).exists()


def _some_steps(rank: int, world_size: int, meeting: str, mine: loop.Job, resume: Path | None, steps: int) -> int:
    """Train for a few steps and write a checkpoint of the end; and, of what was resumed, one of the beginning."""
    if mine.train.precision == "fp16":
        os.environ[precision.EMULATE] = "1"
    one = trainer.Trainer(rank, world_size, meeting, mine, resume)
    batches = one.task.epoch(0, one.state.ranks)
    if resume is not None:
        one.writer.write(one.state.step, one._files())
    for turn in order.turns(len(batches), one.state.seen, rank, world_size)[:steps]:
        one._step(batches[turn.index], turn, turn.seen / len(batches) / mine.train.epochs)
    one.writer.write(one.state.step, one._files())
    one.writer.wait()
    return one.state.seen


def states(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of a checkpoint, converted or not, that any number of processes wrote, by parameter."""
    if snapshots.partitioned(folder):
        folder = processes.run(1, loop._convert, folder, folder / "universal")
    zero = folder / "engine" / "zero"
    if not zero.exists():
        loaded = torch.load(folder / "engine" / "mp_rank_00_model_states.pt", weights_only=False)
        return dict(_leaves("", {"module": loaded["module"], "optimizer": loaded["optimizer"]}))
    parts = {str(path.relative_to(zero)): path for path in zero.rglob("*.pt") if path.parent != zero}
    return dict(_leaves("", {name: torch.load(path, weights_only=False) for name, path in parts.items()}))


def _leaves(name: str, value: object) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}/{key}", inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for at, inner in enumerate(value):
            yield from _leaves(f"{name}/{at}", inner)


SPARSE = {"share": 0.3, "freeze": 0.5, "warmup": 0.03, "reselect_every": 1}  # the first step is dense


@pytest.mark.slow
@pytest.mark.parametrize(
    "turned",
    [
        {"zero": 0, "sparse": SPARSE},
        {"zero": 0, "precision": "fp16"},
        {"zero": 1, "precision": "bf16"},
        {"zero": 2, "precision": "fp16", "offload": "cpu"},
        {"zero": 3, "offload": "disk"},
    ],
    ids=["0-sparse", "0-fp16", "1-bf16", "2-fp16-cpu", "3-disk"],
)
def test_weights_and_moments_are_the_same_bits_for_another_number_of_processes(
    tmp_path: Path, turned: dict[str, object]
) -> None:
    """From two processes to one and back to two, with steps between.

    The combinations hold every ZeRO stage, offload target and precision and sparse training at least once, each so in
    both directions. At stage 0 nothing is partitioned, so its fp16 has an optimizer, and a checkpoint, of its own.
    """
    written: Path | None = None
    seen = 0
    for number, world_size in enumerate((2, 1, 2)):
        resume = written and processes.run(1, loop._convert, written, written.parent / trainer.UNIVERSAL)
        mine = job(tmp_path, world_size=world_size, **turned)
        model = mine.model.model_copy(update={"blocks": 2})  # one to freeze, one to go on
        mine = replace(mine, model=model, checkpoints=tmp_path / f"{number}" / "checkpoints")
        before: dict[str, torch.Tensor] = states(resume) if resume is not None else {}
        seen += 2 * world_size
        assert processes.run(world_size, _some_steps, mine, resume, 2) == seen, "it goes on from there"
        if resume is not None:
            after = states(min(mine.checkpoints.glob("step-*")))
            assert before.keys() == after.keys()
            assert len(before) > 20
            assert all(torch.equal(before[name], after[name]) for name in before)
            moments = [value for name, value in before.items() if "exp_avg" in name]
            assert any(value.any() for value in moments), "no step was taken, so nothing was resumed"
        written = checkpoints.newest(mine.checkpoints)
        assert written is not None


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    mine = job(tmp_path, world_size=1)
    processes.run(1, _some_steps, mine, None, 1)
    written = checkpoints.newest(mine.checkpoints)
    wider = replace(mine, model=mine.model.model_copy(update={"width": 32}))
    with pytest.raises(
        CheckpointError, match=r"step-00000001: does not fit this model (?s:.*); remove it to start again"
    ):
        processes.run(1, _some_steps, wider, written, 1)


def test_a_run_whose_checkpoints_cannot_be_written_ends_all_the_same(tmp_path: Path) -> None:
    mine = job(tmp_path, world_size=1, epochs=1, batch_size=128)
    mine.checkpoints.write_text("a file where the folder should be")
    assert loop.train(mine).curve[-1].epoch == 1
    assert mine.checkpoints.is_file()
