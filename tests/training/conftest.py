"""A training run that nobody disturbed, for all tests that kill one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from slipway.training import loop


@dataclass(frozen=True)
class Whole:
    """A run that was left alone, and wrote no checkpoint but its last."""

    job: loop.Job
    state: loop.State


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """What a run of `job()` that is killed has to end as, bit for bit."""
    from tests.training.test_loop import job  # late: it imports this module

    mine = job(tmp_path_factory.mktemp("whole"), checkpoint_every_s=60.0)
    return Whole(mine, loop.train(mine))
