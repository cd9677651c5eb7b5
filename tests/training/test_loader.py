"""The loader: the same batches in the same order whoever makes them, and nothing left behind however it ends."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slipway.errors import DataError, TransientError
from slipway.params import LoaderParams
from slipway.training import loop, processes, watch
from slipway.training.loader import Loader, Pace, Window
from slipway.training.workers import Worker
from slipway.workloads.base import Tensors
from tests.conftest import until
from tests.training.tasks import Faulty, Numbers
from tests.training.test_loop import job as loop_job
from tests.training.test_loop import weights

STEPS, RANKS = 12, 2


@pytest.fixture(autouse=True, scope="module")
def _workers_start_as_those_of_ranks_do() -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload([processes.HEAVY])


def loader(task: Numbers, workers: int | str = 0) -> Loader:
    return Loader(functools.partial(_same, task), LoaderParams.model_validate({"workers": workers}))


def _same(task: Numbers) -> Numbers:
    return task


def epoch(loader: Loader, task: Numbers, epoch: int, begin: int = 0) -> Generator[Tensors, None, None]:
    return loader.epoch(epoch, RANKS, task.epoch(epoch, RANKS), range(begin, task.steps))


def assert_same(batch: Tensors, task: Numbers, epoch: int, step: int) -> None:
    truth = task.made(epoch, RANKS, step)
    assert list(batch) == list(truth)
    for name, array in truth.items():
        assert (batch[name].dtype, batch[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(batch[name], array)


def workers_of(pids: Path) -> list[int]:
    return [int(path.name) for path in pids.iterdir() if int(path.name) != os.getpid()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("workers", [0, 1, 3, "auto"])
def test_batches_are_the_same_and_in_order_whoever_makes_them(workers: int | str) -> None:
    task = Numbers(STEPS)
    with loader(task, workers) as batches:
        for nth in range(3):
            for step, batch in enumerate(epoch(batches, task, nth)):
                assert_same(batch, task, nth, step)
            assert step == STEPS - 1


def test_a_run_goes_on_in_mid_epoch_and_an_epoch_may_be_left() -> None:
    task = Numbers(STEPS)
    with loader(task, 1) as batches:
        for nth, begin in ((1, 5), (0, 2), (1, 0)):
            made = epoch(batches, task, nth, begin)
            for step in range(begin, STEPS - 2):
                assert_same(next(made), task, nth, step)


def test_batches_come_as_they_are_asked_for_also_one_twice() -> None:
    task = Numbers(STEPS)
    with loader(task) as batches:
        for index, batch in zip([1, 3, 5, 5], batches.epoch(0, 3, task.epoch(0, 3), [1, 3, 5, 5]), strict=True):
            assert list(batch["at"]) == [0, 3, index]


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.integers(0, 119), st.integers(0, 3), max_size=8))
def test_no_batch_is_lost_or_doubled_while_workers_come_and_go(changes: dict[int, int]) -> None:
    task = Numbers(40, delay_s=0.002)
    with loader(task) as batches:
        for nth in range(3):
            made = epoch(batches, task, nth)
            for step in range(40):
                if 40 * nth + step in changes:
                    batches.resize(changes[40 * nth + step])
                assert_same(next(made), task, nth, step)
            assert next(made, None) is None


def test_a_killed_worker_is_replaced_and_its_batch_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = Numbers(100_000, pids=tmp_path, delay_s=0.005)
    killed: set[int] = set()
    deadline = time.monotonic() + 170
    with loader(task, 2) as batches:
        made, step = epoch(batches, task, 0), 0
        while len(killed) < 2 or len(workers_of(tmp_path)) < 4:  # two were killed and two others came
            assert time.monotonic() < deadline, f"killed {killed}, made batches: {workers_of(tmp_path)}"
            assert_same(next(made), Numbers(1), 0, step)
            for pid in set(workers_of(tmp_path)) - killed:
                if len(killed) < 2:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
            step += 1
    assert "a data worker ended with SIGKILL" in caplog.text


def test_a_batch_that_kills_every_worker_is_told() -> None:
    worker = Worker(functools.partial(_same, Faulty(STEPS, fault="killed")))
    worker.start()
    assert_same(worker.batch(0, RANKS, 2), Numbers(STEPS), 0, 2)
    with pytest.raises(TransientError, match=r"batch 3 of epoch 0: 3 data workers were killed"):
        worker.batch(0, RANKS, 3)
    assert_same(worker.batch(0, RANKS, 4), Numbers(STEPS), 0, 4)
    worker.close()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("fault", "kind", "told"),
    [
        ("data", DataError, "batch 3 of epoch 0: photo.jpg: not an image"),
        ("bug", RuntimeError, "(?s)batch 3 of epoch 0: KeyError: 'colour'.*in made"),
    ],
)
def test_what_goes_wrong_in_a_worker_comes_out_in_the_rank(
    workers: int, fault: str, kind: type[Exception], told: str
) -> None:
    task = Faulty(STEPS, fault=fault)
    with loader(task, workers) as batches:
        made = epoch(batches, task, 0)
        for step in range(3):
            assert_same(next(made), task, 0, step)
        with pytest.raises(kind, match=told):
            next(made)


def test_arrays_of_objects_are_refused_by_name() -> None:
    worker = Worker(functools.partial(_same, Faulty(STEPS, fault="objects")))
    with pytest.raises(TypeError, match="names: arrays of Python objects"):
        worker.batch(0, RANKS, 3)
    worker.close()


def test_a_batch_that_is_kept_is_not_overwritten_and_memory_is_used_again() -> None:
    task = Numbers(200, kilobytes=16)
    worker = Worker(functools.partial(_same, task))
    kept = [worker.batch(0, RANKS, step) for step in range(20)]
    for step, batch in enumerate(kept):
        assert_same(batch, task, 0, step)
    part = kept[7]["noise"][1:]
    del kept, batch
    for step in range(20, 200):
        assert_same(worker.batch(0, RANKS, step), task, 0, step)
    np.testing.assert_array_equal(part, task.made(0, RANKS, 7)["noise"][1:])
    slots = Path("/proc/self/maps").read_text().count("slipway-batch")
    assert slots <= 21, "slots are not used again"
    worker.close()


RANK_PROGRAM = """
import functools, sys, time
from pathlib import Path
from slipway.params import LoaderParams
from slipway.training import loop, processes, watch
from slipway.training.loader import Loader
from tests.conftest import until
from tests.training.tasks import Numbers
from tests.training.test_loader import _same

if __name__ == "__main__":
    task = Numbers(10_000, pids=Path(sys.argv[1]), delay_s=60.0, slow_from=8)
    with Loader(functools.partial(_same, task), LoaderParams(workers=2)) as batches:
        for _ in batches.epoch(0, 1, task.epoch(0, 1), range(10_000)):
            time.sleep(0.3)  # so that workers, once they are there, make some
"""


def test_workers_end_with_their_rank_and_no_shared_memory_is_left(tmp_path: Path) -> None:
    before = set(Path("/dev/shm").iterdir())
    pids = tmp_path / "pids"
    pids.mkdir()
    program = tmp_path / "rank.py"
    program.write_text(RANK_PROGRAM)
    rank = subprocess.Popen(
        [sys.executable, str(program), str(pids)], env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    )
    until(lambda: len([pid for pid in workers_of(pids) if pid != rank.pid]) == 2)
    time.sleep(0.5)  # they are in the midst of a batch that takes a minute
    made = [pid for pid in workers_of(pids) if pid != rank.pid]
    assert all(map(alive, made))
    rank.kill()
    rank.wait()
    until(lambda: not any(map(alive, made)), 30.0)  # well before their batches would be done
    assert not {path for path in set(Path("/dev/shm").iterdir()) - before if "slipway" in path.name}


def settled(make_s: float, step_s: float, most: int, cores: float, windows: int = 60) -> list[int]:
    """Workers over time of a job whose accelerator takes `step_s` and whose batches take `make_s` of one core each."""
    pace, workers, seen = Pace(most), 0, []
    for _ in range(windows):
        rate = min(1 / step_s, min(max(workers, 1), cores) / make_s)
        workers = pace.next(workers, Window(busy=rate * step_s, load=rate * make_s if workers else 0.0, rate=rate))
        seen.append(workers)
    return seen


def test_workers_are_added_until_the_accelerator_is_busy_and_no_further() -> None:
    assert set(settled(make_s=0.001, step_s=0.02, most=4, cores=8)) == {0}
    assert settled(make_s=0.07, step_s=0.02, most=8, cores=8)[-20:] == [3] * 20  # 86 % busy
    assert max(settled(make_s=1.0, step_s=0.02, most=4, cores=64)) == 4


def test_a_worker_that_brings_nothing_is_sent_off_and_seldom_tried_again() -> None:
    seen = settled(make_s=0.5, step_s=0.02, most=8, cores=2, windows=200)
    assert seen.count(2) > 0.9 * len(seen)
    assert max(seen) == 3


@given(make_s=st.floats(0.001, 1.0), step_s=st.floats(0.001, 1.0), most=st.integers(1, 8), cores=st.integers(1, 8))
def test_the_pace_stays_in_its_bounds_and_does_not_swing(make_s: float, step_s: float, most: int, cores: int) -> None:
    seen = settled(make_s, step_s, most, cores, windows=300)
    assert min(seen) >= 0
    assert max(seen) <= most
    changes = sum(a != b for a, b in itertools.pairwise(seen[100:]))
    assert changes <= 10, seen


def test_idle_workers_are_taken_away_when_the_input_gets_cheap() -> None:
    pace = Pace(4)
    workers = 0
    for _ in range(4):
        workers = pace.next(workers, Window(busy=0.2 * (workers + 1), load=workers, rate=1.0 + workers))
    assert workers == 3
    for _ in range(40):
        workers = pace.next(workers, Window(busy=0.99, load=0.05, rate=10.0))
    assert workers == 0


def test_auto_adds_workers_where_input_is_slow_and_starts_none_where_it_is_not() -> None:
    task = Numbers(10_000, delay_s=0.03)
    with loader(task, "auto") as batches:
        for step, batch in enumerate(epoch(batches, task, 0)):
            assert_same(batch, Numbers(1), 0, step)
            time.sleep(0.002)
            if batches.workers:
                break
        assert step < 1000
        assert batches.workers == 1
        assert watch.gauges()["data_workers"] == 1
    started = []
    for _ in range(3):  # once is enough: a machine that is busy with other things makes any input slow
        with loader(Numbers(60), "auto") as batches:
            for _ in epoch(batches, Numbers(60), 0):
                time.sleep(0.04)
            started.append(batches.workers)
        if started[-1] == 0:
            break
    assert started[-1] == 0, started


@pytest.mark.slow
def test_training_stays_the_same_bit_for_bit_whoever_makes_the_batches(tmp_path: Path) -> None:
    ended = []
    for workers in (0, 2):
        job = loop_job(tmp_path / str(workers), epochs=8, checkpoint_every_s=60.0, loader=LoaderParams(workers=workers))
        state = loop.train(job)
        ended.append(([(point.loss, point.metric) for point in state.curve], weights(job.out)))
    assert ended[0] == ended[1]
