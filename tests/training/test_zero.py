"""ZeRO: every stage, with and without offload, trains as plain data parallel does, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slipway.config import TrainParams
from slipway.errors import ParamsError
from slipway.training import loop, processes
from slipway.workloads.ranker.params import RankerParams
from tests.ranker import data

MODEL = RankerParams(width=128, blocks=2, max_length=8, dropout=0.2, negatives=16)
STEPS = 3
SETTINGS = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (1, "cpu"), (2, "disk"), (3, "cpu"), (3, "disk")]


def _losses(
    rank: int, world_size: int, meeting: str, folder: Path, settings: list[tuple[int, str]]
) -> dict[tuple[int, str], Any]:
    """Losses of the first steps, and the model's state, under every setting, on the same data and seed."""
    import torch

    from slipway.training import engine
    from slipway.workloads.base import part

    engine.join(rank, world_size, meeting)
    found = {}
    for stage, offload in settings:
        train = TrainParams(zero=stage, offload=offload, world_size=world_size, batch_size=16)  # type: ignore[arg-type]
        torch.manual_seed(1)
        task = part("ranker", "training").TASK(folder, train, MODEL)
        made = engine.make(task.model(), train, folder.parent / "disk")
        batches, losses = task.epoch(0, world_size), []
        for step in range(STEPS):
            torch.manual_seed(step)
            batch = {name: torch.from_numpy(value) for name, value in batches[step * world_size + rank].items()}
            loss = made(**batch)
            made.backward(loss)
            state = engine.state_bytes(made)
            made.step()
            torch.distributed.all_reduce(loss := loss.detach().clone())
            losses.append(float(loss) / world_size)
        with engine.evaluating(made) as module:
            metric, _ = task.validate(module, rank)
        found[stage, offload] = (losses, metric, state)
    return found


@pytest.mark.slow
def test_every_stage_and_offload_trains_as_plain_data_parallel_does_in_its_share_of_memory(tmp_path: Path) -> None:
    ingested = data.write(tmp_path / "data", data.steps(users=400, items=600))
    found = processes.run(2, _losses, ingested, SETTINGS)
    plain, metric, _ = found[0, "none"]
    for losses, reached, _ in found.values():
        assert losses == pytest.approx(plain, rel=1e-5)
        assert reached == pytest.approx(metric, rel=1e-3)
    assert not list((tmp_path / "disk").iterdir()), "the mapped files still have names"

    alone = processes.run(1, _losses, ingested, [(3, "none")])[3, "none"][2]
    assert found[3, "none"][2].device.state == pytest.approx(alone.device.state / 2, rel=0.05)


def test_offload_without_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="offload cpu needs zero 1, 2, 3 or auto"):
        TrainParams(zero=0, offload="cpu")


def test_fp16_is_refused_where_there_is_none_before_training_begins(tmp_path: Path) -> None:
    train = TrainParams(precision="fp16", world_size=1, batch_size=16)
    ingested = data.write(tmp_path / "data", data.steps(users=40, items=60))
    job = loop.Job("ranker", ingested, train, MODEL, tmp_path / "checkpoints", tmp_path / "out")
    with pytest.raises(ParamsError, match="fp16 is not supported by this machine's cpu; use bf16"):
        loop.train(job)
