"""What stops a run, and what does not."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipway.errors import DivergedError
from slipway.params import TrainParams
from slipway.training import checkpoints, guard, loop
from slipway.training.guard import Guard
from tests.training.test_loop import job


def look(watched: Guard, losses: list[float], first: int = 0) -> None:
    for step, loss in enumerate(losses, first):
        watched.check(step, loss, 1.0, skipped=False)


def test_a_loss_that_is_no_number_stops_at_its_step_and_says_what_to_try() -> None:
    watched = Guard(TrainParams(learning_rate=0.5, precision="bf16"))
    look(watched, [2.0] * 7)
    with pytest.raises(DivergedError, match=r"loss is nan at step 7; try to lower train\.learning_rate \(now 0\.5\)"):
        watched.check(7, math.nan, 1.0, skipped=False)
    with pytest.raises(DivergedError, match=r"fp32 \(now bf16\)"):
        watched.check(7, math.inf, 1.0, skipped=False)
    with pytest.raises(DivergedError, match=r"norm of the gradient is inf at step 1,007, with a loss of 2"):
        watched.check(1007, 2.0, math.inf, skipped=False)


def test_a_step_that_loss_scaling_skipped_is_no_fault() -> None:
    watched = Guard(TrainParams(precision="fp16"))
    look(watched, [2.0] * 20)
    for loss in (math.nan, math.inf, 1e9, 2.0):
        watched.check(20, loss, math.inf, skipped=True)
    assert watched.calm
    watched.check(21, 2.0, None, skipped=False)


def test_an_exploding_loss_stops_after_twenty_steps_and_names_the_first() -> None:
    watched = Guard(TrainParams())
    look(watched, [3.0 - step / 100 for step in range(150)])
    high = [20.0 + step for step in range(guard.STEPS)]
    look(watched, high[:1], 150)
    assert not watched.calm, "no checkpoint may be written from the first suspicious step on"
    with pytest.raises(DivergedError, match=r"explodes: at step 169 it is 39, .* for 20 steps, since step 150; try"):
        look(watched, high[1:], 151)


def test_a_run_that_explodes_from_its_first_steps_on_stops_too() -> None:
    watched = Guard(TrainParams())
    with pytest.raises(
        DivergedError, match=r"explodes: at step 22 it is 1\.049e\+06, .* the usual 1 for 20 steps, since step 3"
    ):
        look(watched, [2.0**step for step in range(3)] + [2.0**20] * guard.STEPS)


def test_a_spike_that_passes_is_borne() -> None:
    watched = Guard(TrainParams())
    for _ in range(3):
        look(watched, [1.0] * 30 + [50.0] * (guard.STEPS - 1))
    look(watched, [1.0])
    assert watched.calm


@given(st.lists(st.floats(0.5, 1.9), min_size=1, max_size=300))
def test_noise_within_the_factor_never_stops_a_run(losses: list[float]) -> None:
    look(Guard(TrainParams()), losses)


@given(st.lists(st.floats(1e-6, 0.49), min_size=40, max_size=120))
def test_a_model_that_has_learnt_much_may_lose_some_of_it(losses: list[float]) -> None:
    look(Guard(TrainParams()), [1.0, *losses])


def test_a_run_that_goes_on_judges_like_one_that_was_not_stopped() -> None:
    losses = [2.0 + math.sin(step) for step in range(200)]
    whole, halves = Guard(TrainParams()), [Guard(TrainParams()) for _ in range(3)]
    look(whole, losses)
    look(halves[0], losses[:70])
    for before, after in pairwise(halves):
        after.load_state_dict(before.state_dict())
    look(halves[-1], losses[70:], 70)
    assert halves[-1].state_dict() == whole.state_dict()


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_the_last_good_checkpoint_and_none_after_it(tmp_path: Path) -> None:
    mine = job(tmp_path, learning_rate=3.0, zero=0, epochs=6)
    with pytest.raises(DivergedError, match=r"explodes.* since step \d+; .*the last good checkpoint is ") as caught:
        loop.train(mine)
    kept = sorted(mine.checkpoints.glob("step-*"))
    assert kept[-1].name in str(caught.value)
    assert 0 < int(kept[-1].name.removeprefix("step-")) < caught.value.step
    assert checkpoints.newest(mine.checkpoints) == kept[-1]
