"""Precision: an overflow in fp16 skips its step and halves the scale, and training goes on."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from slipway.errors import ParamsError, SlipwayError
from slipway.params import LossScaleParams, TrainParams
from slipway.training import loop, precision, processes, trainer
from tests.training.test_loop import job


def test_the_scale_backs_off_at_once_and_grows_after_a_window() -> None:
    held = SimpleNamespace(cur_scale=2.0**15, cur_iter=0, last_overflow_iter=-1)
    params, seen = LossScaleParams(window=3), []
    for overflow in (False, False, False, True, True, False, False, False):
        precision.update(held, overflow, params)
        seen.append(held.cur_scale / 2**15)
    assert seen == [1, 1, 2, 1, 0.5, 0.5, 0.5, 1]


def test_an_overflow_at_the_least_scale_stops() -> None:
    held = SimpleNamespace(cur_scale=1.5, cur_iter=7, last_overflow_iter=6)
    precision.update(held, True, LossScaleParams())
    assert held.cur_scale == precision.FLOOR
    with pytest.raises(SlipwayError, match="gradients overflow at step 8 although the loss scale is down to 1; lower"):
        precision.update(held, True, LossScaleParams())


def _emulated(rank: int, world_size: int, meeting: str, mine: loop.Job) -> loop.State:
    os.environ[precision.EMULATE] = "1"  # the fp16 of DeepSpeed's engine, in software
    return trainer.Trainer(rank, world_size, meeting, mine).run()


@pytest.mark.slow
def test_training_recovers_from_an_overflow(tmp_path: Path) -> None:
    # After 12 steps the scale grows 2^16-fold, and the gradients overflow in earnest.
    scale = {"initial": 2.0**12, "growth": 2.0**16, "window": 12}
    mine = job(tmp_path, precision="fp16", zero=2, world_size=1, epochs=2, loss_scale=scale, checkpoint_every_s=600.0)
    state = processes.run(1, _emulated, mine)
    first, grown, *changes = state.loss_scale
    assert (first.scale, first.overflow) == (2.0**12, False)
    assert (grown.step, grown.scale, grown.overflow) == (11, 2.0**28, False)
    assert changes[0].overflow, changes
    assert changes[0].step == 12
    for before, after in zip([grown, *changes], changes, strict=False):
        if after.overflow:
            assert after.scale == before.scale / 2
    assert state.curve[-1].loss < 0.9 * state.curve[0].loss, state.curve
    assert state.curve[-1].metric > 0.5, state.curve


def test_fp16_is_refused_where_there_is_none_before_training_begins(tmp_path: Path) -> None:
    train = TrainParams(precision="fp16", world_size=1)
    with pytest.raises(ParamsError, match="fp16 is not supported by this machine's cpu; use bf16"):
        precision.check(train)
    with pytest.raises(ParamsError, match="fp16 is not supported by this machine's cpu; use bf16"):
        loop.train(job(tmp_path, precision="fp16", world_size=1))
