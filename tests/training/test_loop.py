"""The training loop: it learns, and a killed run ends with the same weights as one that was left alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slipway import trained
from slipway.errors import SlipwayError, TransientError
from slipway.params import TrainParams
from slipway.training import checkpoints, loop, processes, trainer
from slipway.workloads.ranker.params import RankerParams
from tests.conftest import until
from tests.ranker import data
from tests.training.conftest import Whole

MODEL = RankerParams(width=16, blocks=1, max_length=8, dropout=0.2, negatives=16)


def job(folder: Path, **turned: object) -> loop.Job:
    train = TrainParams.model_validate(
        {"epochs": 4, "batch_size": 16, "learning_rate": 0.01, "world_size": 2, "checkpoint_every_s": 0.001, **turned}
    )
    ingested = data.write(folder / "data", data.steps(users=400, items=30))
    return loop.Job("ranker", ingested, train, MODEL, folder / "checkpoints", folder / "out")


def weights(folder: Path) -> dict[str, bytes]:
    with np.load(folder / trained.WEIGHTS, allow_pickle=False) as stored:
        return {name: stored[name].tobytes() for name in stored.files}


@pytest.mark.slow
def test_a_run_that_was_killed_ends_bit_for_bit_like_one_that_was_not(whole: Whole, tmp_path: Path) -> None:
    curve = whole.state.curve
    assert curve[-1].metric > 2 * curve[0].metric or curve[-1].metric > 0.5, curve

    killed = job(tmp_path)
    stage = multiprocessing.get_context("spawn").Process(target=loop.train, args=(killed,))
    stage.start()
    deadline = time.monotonic() + 300
    while len(list(killed.checkpoints.glob("step-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(stage.pid or 0, signal.SIGKILL)
    stage.join()
    resumed = checkpoints.newest(killed.checkpoints)
    assert resumed is not None, "no checkpoint was written before the kill"
    assert not (killed.out / trained.MODEL).exists()
    again = loop.train(replace(killed, train=whole.job.train))

    assert [(p.loss, p.metric) for p in again.curve] == [(p.loss, p.metric) for p in curve]
    assert weights(killed.out) == weights(whole.job.out)


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "precision"), [(0, "bf16"), (2, "fp32")])
def test_other_zeros_and_precisions_learn_too(tmp_path: Path, zero: int, precision: str) -> None:
    state = loop.train(job(tmp_path, zero=zero, precision=precision, checkpoint_every_s=60.0))
    assert state.best.metric > 0.3, state.curve


def test_the_learning_rate_rises_then_falls() -> None:
    rates = [trainer.learning_rate(1.0, step / 100) for step in range(1, 101)]
    assert rates[4] == pytest.approx(1.0)
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.03


def test_a_run_has_another_name_when_data_or_parameters_change(tmp_path: Path) -> None:
    one = job(tmp_path)
    name = loop.key("ranker", one.data, one.train, one.model)
    assert name == loop.key("ranker", one.data, one.train, one.model)
    assert name != loop.key("ranker", one.data, one.train.model_copy(update={"seed": 9}), one.model)
    assert name == loop.key("ranker", one.data, one.train.model_copy(update={"world_size": 1}), one.model)
    (one.data / "items.npy").write_bytes(b"")
    assert name != loop.key("ranker", one.data, one.train, one.model)


def _die(rank: int, world_size: int, meeting: str) -> str:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
    return "never"


def _fail(rank: int, world_size: int, meeting: str) -> str:
    if rank == 1:
        raise SlipwayError("training: rank 1 is at fault")
    time.sleep(600)
    return "never"


def _wait(rank: int, world_size: int, meeting: str, folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(600)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_its_launcher(tmp_path: Path, number: int) -> None:
    launcher = multiprocessing.get_context("spawn").Process(target=processes.run, args=(2, _wait, tmp_path))
    launcher.start()
    until(lambda: len(list(tmp_path.iterdir())) == 2)
    ranks = [int(path.name) for path in tmp_path.iterdir()]
    assert launcher.pid is not None
    os.kill(launcher.pid, number)
    launcher.join()
    until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))  # else they sleep for ten minutes


def test_a_killed_rank_ends_the_others_and_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    with pytest.raises(TransientError, match="rank 1 ended with SIGKILL"):
        processes.run(2, _die)
    with pytest.raises(SlipwayError, match="rank 1 is at fault"):
        processes.run(2, _fail)
    assert time.monotonic() - began < 120, "the others were waited for"
