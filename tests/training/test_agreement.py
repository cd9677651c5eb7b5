"""Processes that would train different things are refused before they begin."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from slipway.errors import SlipwayError
from slipway.training import agreement, loop, processes, trainer
from tests.training.test_loop import job


def _other_seed(rank: int, world_size: int, meeting: str, mine: loop.Job) -> loop.State:
    if rank == 1:
        mine = replace(mine, train=mine.train.model_copy(update={"seed": 9}))
    return trainer.Trainer(rank, world_size, meeting, mine).run()


def _other_data(rank: int, world_size: int, meeting: str, mine: loop.Job) -> loop.State:
    if rank == 1:
        mine = replace(mine, data=mine.data.with_name("other"))
    return trainer.Trainer(rank, world_size, meeting, mine).run()


def test_a_rank_with_other_parameters_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(
        SlipwayError, match=r"rank 1 disagrees with rank 0 on parameters: train\.seed is 9, not 1; start"
    ):
        processes.run(2, _other_seed, job(tmp_path))


def test_a_rank_with_other_data_is_refused_at_the_start(tmp_path: Path) -> None:
    mine = job(tmp_path)
    shutil.copytree(mine.data, mine.data.with_name("other"))
    items = mine.data.with_name("other") / "items.npy"
    items.write_bytes(items.read_bytes()[:-1] + b"\7")
    with pytest.raises(SlipwayError, match=r"rank 1 disagrees with rank 0 on data: items\.npy is .* copy the same"):
        processes.run(2, _other_data, mine)


def test_data_that_differ_between_their_ends_are_told_by_the_name_of_the_run() -> None:
    here, there = ({"data": {}, "parameters": {}, "code": {}, "run": {"its name": name}} for name in ("ab", "cd"))
    told = agreement.disagreement([here, there]) or ""
    assert told.startswith(
        "rank 1 disagrees with rank 0 on run: its name is cd, not ab; make data, params.yaml and code"
    )


def test_other_code_is_told_by_file_and_library() -> None:
    here: agreement.Facts = {
        "data": {},
        "parameters": {},
        "code": {"torch": "2.13.0", "slipway/training/loop.py": "ab (9 bytes)"},
    }
    there: agreement.Facts = {**here, "code": {"torch": "2.12.0"}}
    assert agreement.disagreement([here, here]) is None
    told = agreement.disagreement([here, here, there]) or ""
    assert told.startswith("rank 2 disagrees with rank 0 on code: slipway/training/loop.py is missing, not ab")
    assert "torch is 2.12.0, not 2.13.0" in told
    assert told.endswith("check out the same commit and install the same requirements.lock on every machine")
