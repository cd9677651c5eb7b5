"""Communication among real processes: every method gives the mean, replicas stay equal, a resumed run ends the same."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from slipway import config
from slipway.errors import ParamsError, SlipwayError, TransientError
from slipway.params import CommunicationParams, TrainParams
from slipway.training import checkpoints, communication, loop, nodes, processes, trainer
from slipway.training.nodes import Place
from tests.training.test_loop import job, weights

WORLD = 4  # two nodes of two
TABLE, TOUCHED = (400, 16), 10  # items, of which each process touches so many in a step


def settings(method: str, **turned: object) -> TrainParams:
    told = CommunicationParams.model_validate({"method": method, "warmup_steps": 2, **turned})
    return TrainParams(zero=0, world_size=WORLD, communication=told)


def pretend(rank: int, size: int = 2) -> None:
    """Tell this process that it is on one of several nodes, as torchrun would."""
    os.environ.update(
        RANK=str(rank), GROUP_RANK=str(rank // size), LOCAL_RANK=str(rank % size), LOCAL_WORLD_SIZE=str(size)
    )


def parameters() -> list[nn.Parameter]:
    frozen = nn.Parameter(torch.zeros(5), requires_grad=False)
    return [nn.Parameter(torch.zeros(shape)) for shape in ((64, 48), (48,), (32, 64), (64, 48), TABLE)] + [frozen]


def fill(each: Sequence[nn.Parameter], rank: int, step: int) -> None:
    generator = torch.Generator().manual_seed(100 * step + rank)
    for i, parameter in enumerate(each):
        parameter.grad = torch.randn(parameter.shape, generator=generator) if parameter.requires_grad else None
        if parameter.grad is not None and parameter.shape == TABLE:
            first = (step + rank * TOUCHED) % 300
            parameter.grad[:first], parameter.grad[first + TOUCHED :] = 0, 0
        if i == rank:  # a rank that did not use this one
            parameter.grad = None


def means(step: int) -> list[torch.Tensor]:
    ranks = []
    for rank in range(WORLD):
        each = parameters()
        fill(each, rank, step)
        ranks.append([torch.zeros(p.shape) if p.grad is None else p.grad for p in each if p.requires_grad])
    return [torch.stack(column).mean(0) for column in zip(*ranks, strict=True)]


def grads(each: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad.clone() for p in each if p.grad is not None]


def everyone_has(tensors: Sequence[torch.Tensor]) -> bool:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    gathered = [torch.empty_like(flat) for _ in range(WORLD)]
    dist.all_gather(gathered, flat)
    return all(torch.equal(flat, other) for other in gathered)


def _methods(rank: int, world_size: int, meeting: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    pretend(rank)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    where, found = nodes.discover("cpu"), {}
    turns = {"flat": {}, "hierarchical": {}, "powersgd": {"rank": 2}, "hierarchical_powersgd": {"rank": 2}}
    for method, turned in turns.items():
        each = parameters()
        reducer = communication.make(settings(method, **turned), each, where)
        steps, equal = [], True
        for step in range(4):
            fill(each, rank, step)
            reducer.reduce(each)
            steps.append(grads(each))
            equal = equal and everyone_has(steps[-1])
            if step == 2:  # killed, and gone on from a checkpoint
                kept = reducer.state_dict()
                reducer = communication.make(settings(method, **turned), each, where)
                reducer.load_state_dict(kept)
        whole_each = parameters()
        whole = communication.make(settings(method, **turned), whole_each, where)
        for step in range(4):
            fill(whole_each, rank, step)
            whole.reduce(whole_each)
        same = all(torch.equal(a, b) for a, b in zip(grads(whole_each), steps[-1], strict=True))
        plain = [[grad.numpy() for grad in step] for step in steps]  # tensors would not outlive their process
        found[method] = (plain, equal, same, whole.figures(), reducer.figures())
    return {"where": where, "methods": found, "auto": _auto(rank, where), "half": _half(rank, where)} | {
        "dense": _dense(rank, where)
    }


def _auto(rank: int, where: nodes.Nodes) -> list[Any]:
    """Two fresh processes' worth of `auto` on loopback, where a compression cannot pay.

    It decides by time, so it is asked thrice if need be: something else that the machine does may mislead it.
    """
    right = True
    for _ in range(3):
        each = parameters()
        reducer = communication.make(settings("auto"), each, where)
        for step in range(communication.TRIALS + 2):
            fill(each, rank, step)
            reducer.reduce(each)
            pairs = zip(grads(each), means(step), strict=True)
            right = right and (reducer.compresses is True or all(torch.allclose(a, b, atol=1e-6) for a, b in pairs))
        if not reducer.compresses:  # the same on every rank
            break
    other = communication.make(settings("auto"), each, where)
    other.load_state_dict(reducer.state_dict())
    return [reducer.compresses, right, other.compresses]


def _half(rank: int, where: nodes.Nodes) -> list[Any]:
    """fp16 as DeepSpeed leaves it: scaled gradients in half precision, one of them infinite in the fourth step."""
    each = [nn.Parameter(torch.zeros(p.shape, dtype=torch.float16)) for p in parameters()[:5]]
    reducer = communication.make(settings("hierarchical_powersgd", rank=8), each, where)
    scale, seen = 1024.0, []
    reducer.loss_scale = lambda: scale
    for step in range(5):
        full = parameters()
        fill(full, 9, step)  # the same on all
        for parameter, other in zip(each, full, strict=False):
            assert other.grad is not None
            parameter.grad = (other.grad / 100 * scale).half()
        if step == 3 and rank == 3:
            assert each[1].grad is not None
            each[1].grad[0] = torch.inf
        before = [] if reducer.memory is None else [error.clone() for error in reducer.memory.power.errors]
        reducer.reduce(each)
        finite = all(bool(grad.isfinite().all()) for grad in grads(each))
        untouched = before and reducer.memory and all(map(torch.equal, before, reducer.memory.power.errors))
        if step == 4:
            norms = [[float(grad.float().norm()) for grad in grads(one)] for one in (each, full)]
            right = [ours / (wanted * scale / 100) for ours, wanted in zip(*norms, strict=True)]
        seen.append((finite, bool(untouched)))
        scale = scale / 2 if step == 3 else scale
    assert reducer.memory is not None or not reducer.links.leads
    largest = max(float(e.abs().max()) for e in reducer.memory.power.errors) if reducer.memory else 0.0
    return [seen, largest, right]


def _dense(rank: int, where: nodes.Nodes) -> list[Any]:
    """A table of which more and more rows are touched: what travels in each step, and whether all stay equal."""
    each, found = [nn.Parameter(torch.zeros(TABLE)), nn.Parameter(torch.zeros(64, 48))], list[Any]()
    reducer = communication.make(settings("hierarchical_powersgd", rank=4), each, where)
    for step, count in enumerate((5, 9, 9, 130, 5)):
        generator = torch.Generator().manual_seed(10 * step + rank)
        for parameter in each:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        assert each[0].grad is not None
        each[0].grad[count * (rank + 1) :], each[0].grad[: count * rank] = 0, 0
        reducer.reduce(each)
        kept = reducer.state_dict()
        reducer = communication.make(settings("hierarchical_powersgd", rank=4), each, where)
        reducer.load_state_dict(kept)
        found.append((reducer.plan and reducer.plan.tables, everyone_has(grads(each))))
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    answer: dict[str, Any] = processes.run(WORLD, _methods)
    return answer


def test_the_nodes_are_read_from_the_launchers_environment(found: dict[str, Any]) -> None:
    assert found["where"].ranks == ((0, 1), (2, 3))


@pytest.mark.parametrize("method", ["flat", "hierarchical", "powersgd", "hierarchical_powersgd"])
def test_every_method_starts_with_the_mean_and_keeps_replicas_equal(found: dict[str, Any], method: str) -> None:
    told, equal, same, _, _ = found["methods"][method]
    steps = [[torch.from_numpy(grad) for grad in step] for step in told]
    compressed = method.endswith("powersgd")
    for step, ours in enumerate(steps[:2] if compressed else steps):
        for a, b in zip(ours, means(step), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # float32's rounding: the order of sums differs
    assert equal, "the processes ended with different gradients"
    assert same, "a reducer that went on from its state did otherwise than one that was not stopped"
    if compressed:
        assert not torch.allclose(steps[2][0], means(2)[0], atol=1e-3), "nothing was compressed"
        torch.testing.assert_close(steps[2][1], means(2)[1], rtol=1e-5, atol=1e-6)  # a vector travels as it is
        torch.testing.assert_close(steps[2][4], means(2)[4], rtol=0, atol=0.2)  # rows are rounded to 4 bits


def test_compression_among_leaders_owes_what_compression_among_all_does(found: dict[str, Any]) -> None:
    """The approximation depends on the mean alone, so the hierarchy changes nothing but rounding."""
    flat, hierarchical = (found["methods"][method][0][2] for method in ("powersgd", "hierarchical_powersgd"))
    for a, b in zip(flat, hierarchical, strict=True):
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)  # factors are rounded to bfloat16


def test_bytes_between_nodes_are_counted_and_survive_a_kill(found: dict[str, Any]) -> None:
    size = 4 * (64 * 48 * 2 + 48 + 32 * 64 + 400 * 16)
    _, _, _, flat, resumed = found["methods"]["flat"]
    assert flat["sent_all_bytes"] == pytest.approx(4 * 2 * (2 * 3 / 4) * size)  # two edges of the ring cross
    assert resumed == flat
    assert found["methods"]["hierarchical"][3]["sent_all_bytes"] == pytest.approx(4 * 2 * size)
    compressed = 2 * 2 * (2 * (64 + 48) + 32 + 64) + 4 * 49  # factors in bfloat16, the vector and a flag in float32
    compressed += 2 * TOUCHED * (16 // 2 + 2) + 400 // 8 + 8  # a node's rows in 4 bits, scales, a bitmap, their number
    figures = found["methods"]["hierarchical_powersgd"][3]
    assert figures["sent_all_bytes"] == pytest.approx(2 * 2 * (size + compressed))


def test_auto_gives_the_mean_while_it_tries_and_leaves_compression_off_on_a_fast_link(found: dict[str, Any]) -> None:
    compresses, right, resumed = found["auto"]
    assert right
    assert compresses is False
    assert resumed is False


def test_an_overflow_reaches_every_process_and_not_the_memory(found: dict[str, Any]) -> None:
    seen, largest, right = found["half"]
    assert [finite for finite, _ in seen] == [True, True, True, False, True]
    assert seen[3][1], "the memory changed in the step that overflowed"
    assert 0 < largest < 1, "the memory is free of the loss scale"
    assert all(0.3 < ratio < 1.7 for ratio in right), "the mean has the loss scale once"


def test_a_table_that_becomes_dense_travels_by_factors_from_then_on(found: dict[str, Any]) -> None:
    chosen, equal = zip(*found["dense"], strict=True)
    assert list(chosen) == [None, None, (0,), None, ()]
    assert all(equal)


def places(*told: tuple[int, int, int]) -> list[Place]:
    return [Place(rank, node, local, size) for rank, (node, local, size) in enumerate(told)]


def test_nodes_of_any_order_are_mapped() -> None:
    assert nodes.nodes(places((0, 0, 1))).ranks == ((0,),)
    mixed = nodes.nodes(places((1, 0, 2), (0, 0, 2), (1, 1, 2), (0, 1, 2)))
    assert mixed.ranks == ((1, 3), (0, 2))
    assert mixed.of(2) == (0, 2)
    assert mixed.saves == 1.5, "flat: a ring of four sends 3/2 of the gradient over an edge; two leaders: once"
    assert nodes.nodes(places((0, 0, 1), (1, 0, 1))).saves == nodes.nodes(places((0, 0, 1))).saves == 1


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (places((0, 0, 2), (0, 1, 2), (1, 0, 1)), r"unequal numbers of processes \(\{0: 2, 1: 1\}\)"),
        (places((0, 0, 2), (0, 0, 2)), r"node 0 .* LOCAL_RANK \[0, 0\]"),
        (places((0, 0, 2), (1, 0, 2)), r"node 0 .*LOCAL_WORLD_SIZE \[2\]"),
        (places((0, 0, 2), (0, 1, 3)), r"LOCAL_WORLD_SIZE \[2, 3\]"),
        ([replace(places((0, 0, 1))[0], rank=5)], r"rank 0 was told RANK=5"),
    ],
)
def test_a_map_that_is_uneven_or_contradicts_itself_is_refused(told: list[Place], message: str) -> None:
    with pytest.raises(SlipwayError, match=message):
        nodes.nodes(told)


def test_a_launcher_that_does_not_tell_the_nodes_is_refused() -> None:
    with pytest.raises(SlipwayError, match=r"LOCAL_RANK=, LOCAL_WORLD_SIZE=x\); start with torchrun"):
        nodes.place({"RANK": "0", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "x"})


@pytest.mark.parametrize("zero", [1, 2, 3, "auto"])
def test_a_method_that_needs_whole_gradients_is_refused_where_zero_reduces_them(zero: object) -> None:
    raw = {"train": {"zero": zero, "communication": {"method": "hierarchical_powersgd"}}}
    with pytest.raises(ParamsError, match=rf"train: .*method: hierarchical_powersgd needs zero: 0, got zero: {zero}"):
        config.parse(raw)
    for method in ("flat", "auto"):
        config.parse({"train": {"zero": zero, "communication": {"method": method}}})


def _train(rank: int, world_size: int, meeting: str, told: loop.Job, resume: Path | None, dies: int) -> loop.State:
    """Train as one of two nodes of two; the last process is killed once a checkpoint of that step is there."""
    pretend(rank)
    if rank == world_size - 1 and dies:
        threading.Thread(target=_die, args=(told.checkpoints, dies), daemon=True).start()
    return trainer.run(rank, world_size, meeting, told, resume, processes.Held(0))


def _die(folder: Path, step: int) -> None:
    while not any(int(path.name[5:]) >= step for path in folder.glob("step-*")):
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGKILL)


def two_nodes(folder: Path, **turned: object) -> loop.Job:
    told = CommunicationParams(method="hierarchical_powersgd", rank=2, warmup_steps=5)
    return job(folder, world_size=WORLD, zero=0, epochs=3, batch_size=8, communication=told, **turned)


@pytest.mark.slow
def test_compressed_training_learns_and_ends_bit_for_bit_the_same_when_it_was_killed(tmp_path: Path) -> None:
    whole = two_nodes(tmp_path / "whole", checkpoint_every_s=60.0)
    state: loop.State = processes.run(WORLD, _train, whole, None, 0)
    assert state.best.metric > 0.5, state.curve

    killed = two_nodes(tmp_path / "killed", checkpoint_every_s=0.001)
    with pytest.raises(TransientError):
        processes.run(WORLD, _train, killed, None, 12)
    resumed = checkpoints.newest(killed.checkpoints)
    assert resumed is not None
    assert 12 <= int(resumed.name[5:]) < state.step - 5, "killed too late to show anything"
    rest = replace(killed, train=killed.train.model_copy(update={"checkpoint_every_s": 60.0}))
    again: loop.State = processes.run(WORLD, _train, rest, resumed, 0)
    assert [(p.loss, p.metric) for p in again.curve] == [(p.loss, p.metric) for p in state.curve]
    assert weights(killed.out) == weights(whole.out)
