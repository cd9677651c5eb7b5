"""ZeRO: every stage, with and without offload, trains as plain data parallel does, in less memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from slipway.params import TrainParams
from slipway.training import checkpoints, loop, plan, processes, survey
from slipway.workloads.ranker.params import RankerParams
from tests.ranker import data
from tests.training.test_loop import job, weights

MODEL = RankerParams(width=128, blocks=2, max_length=8, dropout=0.2, negatives=16)
STEPS = 3
PLAIN = (0, "none", "fp32")
SETTINGS = [
    PLAIN, (1, "none", "fp32"), (2, "none", "fp32"), (3, "none", "fp32"), (1, "cpu", "fp32"), (2, "disk", "fp32"),
    (3, "cpu", "fp32"), (3, "disk", "fp32"), (0, "none", "bf16"), (2, "none", "bf16"), (3, "none", "bf16"),
]  # fmt: skip


def _trained(
    rank: int, world_size: int, meeting: str, folder: Path, settings: list[tuple[int, str, str]]
) -> dict[tuple[int, str, str], Any]:
    """Losses of the first steps, metric, memory and activations under every setting, on the same data and seed."""
    import torch

    from slipway.training import engine
    from slipway.workloads.base import part

    engine.join(rank, world_size, meeting)
    found = {}
    for stage, offload, precision in settings:
        turned = {"zero": stage, "offload": offload, "precision": precision, "world_size": world_size, "batch_size": 16}
        train = TrainParams.model_validate(turned)
        torch.manual_seed(1)
        task = part("ranker", "training").TASK(folder, train, MODEL)
        made = engine.make(task.model(), train, folder.parent / "disk")
        updating: list[Any] = []
        inner = getattr(made.optimizer, "optimizer", made.optimizer)
        inner.register_step_pre_hook(lambda *_, made=made, seen=updating: seen.append(engine.state_bytes(made)))
        batches, losses = task.epoch(0, world_size), []
        for step in range(STEPS):
            torch.manual_seed(step)
            arrays = batches[rank]
            batch = {name: torch.from_numpy(value) for name, value in arrays.items()}
            with survey.Kept([*made.module.parameters(), *batch.values()]) as kept:
                loss = made(**batch)
            made.backward(loss)
            between = engine.state_bytes(made)
            made.step()
            torch.distributed.all_reduce(loss := loss.detach().clone())
            losses.append(float(loss) / world_size)
        with engine.evaluating(made) as module:
            metric, _ = task.validate(module, rank)
        expected = survey.activations(task.model(), arrays, train)
        found[stage, offload, precision] = (losses, metric, between, updating[-1], (kept.size, expected))
    return found


@pytest.mark.slow
def test_every_stage_and_offload_trains_as_plain_data_parallel_does_in_the_memory_that_was_planned(
    tmp_path: Path,
) -> None:
    ingested = data.write(
        tmp_path / "data", data.steps(users=513, items=600)
    )  # the last batch of rank 1's validation is empty
    found = processes.run(2, _trained, ingested, SETTINGS)
    plain, metric, *_ = found[PLAIN]
    assert plain[-1] < plain[0], "nothing is learnt"
    elements = found[PLAIN][2].device.parameters // 4
    for (stage, offload, precision), (losses, reached, between, updating, activations) in found.items():
        setting = (stage, offload, precision)
        near = 1e-5 if precision == "fp32" else 0.02
        assert losses == pytest.approx(plain, rel=near), setting
        assert precision != "fp32" or reached == pytest.approx(metric, rel=1e-3), setting
        assert activations[0] == pytest.approx(activations[1], rel=0.05), setting
        planned = plan.places(plan.Model(elements, 0, None), precision, 2, stage, offload)
        for place in ("device", "host", "disk"):
            held, wanted = getattr(updating, place), getattr(planned, place)
            gradients = held.gradients
            if precision != "fp32" and stage in (1, 2):  # what they are copied from is dropped just before
                gradients += getattr(between, place).gradients
            state = held.parameters + gradients + held.optimizer
            assert state == pytest.approx(wanted.state, rel=0.05, abs=100), (setting, place, held, wanted)
    assert not list((tmp_path / "disk").iterdir()), "the mapped files still have names"

    alone = processes.run(1, _trained, ingested, [(3, "none", "fp32")])[3, "none", "fp32"][3]
    assert found[3, "none", "fp32"][3].device.state == pytest.approx(alone.device.state / 2, rel=0.05)


@pytest.mark.slow
def test_a_partitioned_run_on_disk_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    mine = job(tmp_path, zero=3, offload="disk", precision="bf16", epochs=1)
    loop.train(mine)
    whole = weights(mine.out)
    newest = checkpoints.newest(mine.checkpoints)
    assert newest is not None
    shutil.rmtree(newest)
    assert checkpoints.newest(mine.checkpoints) is not None, "nothing to go on from"
    loop.train(mine)
    assert weights(mine.out) == whole


def test_offload_without_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="offload cpu needs zero 1, 2, 3 or auto"):
        TrainParams(zero=0, offload="cpu")
