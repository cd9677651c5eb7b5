"""Top-K sparse training: the gradients of the selected rows, and nothing else, as dense training has them."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from slipway import config
from slipway.errors import ParamsError
from slipway.params import SparseParams
from slipway.training import checkpoints, loop, sparse
from slipway.training.sparse import Rows, Sparse
from tests.training.test_loop import job, weights

STEPS = 128  # of a whole training
SHARES = st.sampled_from([0.1, 0.3, 0.5, 0.9])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are tiny: threads would wait for one another
    yield
    torch.set_num_threads(threads)


class Block(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = x + super().forward(x)  # type: ignore[no-untyped-call]  # torch leaves it so
        return answer


class Net(nn.Module):
    """An embedding whose table is also the output layer, and blocks in between."""

    def __init__(self, blocks: int = 3, width: int = 12, items: int = 20) -> None:
        super().__init__()
        self.table = nn.Embedding(items, width, padding_idx=0)
        self.blocks = nn.ModuleList(
            Block(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, items, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), (ids % 7).flatten())


def trained(steps: int, **turned: Any) -> tuple[Net, torch.optim.AdamW, Sparse]:
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    params = {"share": 0.3, "warmup": 2 / STEPS, "reselect_every": 4, "tables": True, **turned}
    technique = Sparse(net, optimizer, SparseParams.model_validate(params))
    for step in range(steps):
        technique.begin(step, (step + 1) / STEPS)
        update(net, optimizer, step)
    return net, optimizer, technique


def update(net: Net, optimizer: torch.optim.AdamW, step: int) -> float:
    ids = torch.randint(0, 20, (8, 5), generator=torch.Generator().manual_seed(step))
    loss = net(ids)
    torch.autograd.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def dense(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in sparse.without_rows(module)}


def rows_of(net: nn.Module) -> dict[str, Rows]:
    return {name: each for name, each in net.named_modules() if isinstance(each, Rows)}


@given(share=SHARES, samples=st.integers(1, 9), size=st.integers(1, 30), bias=st.booleans(), seed=st.integers(0, 99))
def test_a_linear_layer_has_the_dense_dx_and_the_selected_rows_of_the_dense_dw(
    share: float, samples: int, size: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer, x = nn.Linear(7, size, bias).double(), torch.randn(2, samples, 7, dtype=torch.double, requires_grad=True)
    dy = torch.randn(2, samples, size, dtype=torch.double)
    inputs = [x, layer.weight, *([layer.bias] if bias else [])]
    expected = torch.autograd.grad(layer(x), inputs, dy)

    rows = Rows(nn.Parameter(layer.weight), share)
    got = torch.autograd.grad(
        rows.linear(x, layer.bias), [x, rows.active, *([layer.bias] if bias else [])], dy, allow_unused=False
    )
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1][rows.index])
    assert all(torch.equal(a, b) for a, b in zip(got[2:], expected[2:], strict=True)) or not bias
    least = rows.dense[rows.index].norm(dim=1).min()
    left = torch.ones(size, dtype=torch.bool).index_fill_(0, rows.index, False)
    assert (rows.dense[left].norm(dim=1) <= least).all(), "a larger row was left out"


@given(share=SHARES, seed=st.integers(0, 99), padding=st.sampled_from([None, 3]))
def test_an_embedding_has_the_selected_rows_of_the_dense_gradient(share: float, seed: int, padding: int | None) -> None:
    torch.manual_seed(seed)
    table, ids = nn.Embedding(11, 4, padding_idx=padding), torch.randint(0, 11, (5, 6))
    nn.init.normal_(table.weight)
    dy = torch.randn(5, 6, 4)
    (expected,) = torch.autograd.grad(table(ids), table.weight, dy)
    rows = Rows(nn.Parameter(table.weight), share)
    (got,) = torch.autograd.grad(rows.lookup(ids, padding), rows.active, dy)
    torch.testing.assert_close(got, expected[rows.index])
    assert torch.equal(rows.lookup(ids, padding), table(ids))


def test_routed_experts_of_transformers_have_the_dense_answers_and_gradients() -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    torch.manual_seed(0)
    layer = DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=16, moe_intermediate_size=8, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1
        )
    )
    for weight in layer.parameters():
        nn.init.normal_(weight, std=0.3)
    x, dy = torch.randn(3, 5, 16, requires_grad=True), torch.randn(3, 5, 16)
    experts = {"gate_up_proj": layer.experts.gate_up_proj, "down_proj": layer.experts.down_proj}
    router = layer.gate.weight
    answer = layer(x)
    dx, drouter, *expected = torch.autograd.grad(answer, [x, router, *experts.values()], dy)

    optimizer = torch.optim.AdamW(layer.parameters())
    Sparse(layer, optimizer, SparseParams(share=0.3, warmup=0)).begin(0, 1)
    again = layer(x)
    torch.testing.assert_close(again, answer)
    made = [each for name in experts if isinstance(each := layer.experts.get_submodule(name + sparse.SUFFIX), Rows)]
    got = torch.autograd.grad(again, [x, router, *(each.active for each in made)], dy)
    torch.testing.assert_close(got[0], dx)
    torch.testing.assert_close(got[1], drouter)
    for rows, gradient, whole in zip(made, got[2:], expected, strict=True):
        assert gradient.shape[1] == rows.count < whole.shape[1]
        torch.testing.assert_close(gradient, rows.of(whole))


def test_a_weight_that_is_read_by_name_still_gives_the_rows_their_gradient() -> None:
    net, _, _ = trained(3)
    rows = rows_of(net)["table.weight_rows"]
    x = torch.randn(4, 12)
    torch.autograd.backward((x @ net.table.weight.T).square().sum())
    assert rows.active.grad is not None
    torch.testing.assert_close(rows.active.grad, (2 * (x @ rows.dense.T).T @ x)[rows.index])


@given(share=SHARES, seed=st.integers(0, 99), stacked=st.booleans())
def test_a_new_selection_keeps_what_belongs_to_rows_that_stay(share: float, seed: int, stacked: bool) -> None:
    torch.manual_seed(seed)
    rows = Rows(nn.Parameter(torch.randn(*((3,) if stacked else ()), 15, 2)), share)
    before, state = rows.index.clone(), torch.rand_like(rows.active) + 1
    with torch.no_grad():
        rows.dense.mul_(torch.rand(*rows.dense.shape[:-1], 1))
    moved = rows.select()(state)
    assert torch.equal(rows.active, rows.of(rows.dense))
    for old, new, was, now in zip(
        before.view(-1, rows.count), rows.index.view(-1, rows.count), state.view(-1, rows.count, 2),
        moved.view(-1, rows.count, 2), strict=True,
    ):  # fmt: skip
        kept = dict(zip(old.tolist(), was, strict=True))
        for row, value in zip(new.tolist(), now, strict=True):
            assert torch.equal(value, kept.get(row, torch.zeros(2)))


def test_only_selected_rows_change_and_the_optimizer_holds_state_for_them_alone() -> None:
    net, optimizer, technique = trained(5)
    before, selected = dense(net), {name: rows.index for name, rows in rows_of(net).items()}
    for step in range(5, 8):
        technique.begin(step, (step + 1) / STEPS)
        update(net, optimizer, step)
    after = dense(net)
    assert after.keys() == Net().state_dict().keys()
    for name, value in after.items():
        changed = (value != before[name]).reshape(len(value), -1).any(1)
        index = selected.get(name + sparse.SUFFIX)
        if index is not None:
            left = torch.ones(len(value), dtype=torch.bool).index_fill_(0, index, False)
            assert changed.any(), name
            assert not changed[left].any(), name
    assert torch.equal(net.table.weight, net.head.weight), "tied weights have parted"
    matrices = {each for rows in rows_of(net).values() for each in [rows.active]}
    held = sum(optimizer.state[each]["exp_avg"].numel() for each in matrices)
    whole = sum(value.numel() for name, value in Net().named_parameters() if value.dim() > 1)
    assert 0.3 <= held / whole < 0.35
    assert set(optimizer.state) == {each for each in net.parameters() if each.requires_grad}


def test_tables_stay_dense_unless_they_are_asked_for() -> None:
    net, _, _ = trained(3, tables=False)
    assert {name.split(".")[0] for name in rows_of(net)} == {"blocks"}
    assert net.table.weight.requires_grad
    assert {name.split(".")[0] for name in rows_of(trained(3)[0])} == {"blocks", "table"}  # the head is tied to it


def test_a_row_keeps_its_moments_over_the_end_of_the_warmup() -> None:
    net, optimizer, technique = trained(2)
    moments = {each: optimizer.state[each]["exp_avg"].clone() for each in net.parameters()}
    weight = net.blocks[0].get_submodule("1")._parameters["weight"]
    technique.begin(2, 3 / STEPS)
    rows = rows_of(net)["blocks.0.1.weight_rows"]
    assert weight is not None
    assert torch.equal(optimizer.state[rows.active]["exp_avg"], moments[weight][rows.index])
    assert float(optimizer.state[rows.active]["step"]) == 2


def test_blocks_are_frozen_in_turn_and_frozen_ones_do_not_move() -> None:
    assert [sparse.depth(period, 4, 0.75) for period in range(5)] == [0, 1, 2, 3, 0]
    assert [sparse.depth(period, 2, 0.9) for period in range(3)] == [0, 1, 0]
    assert {sparse.depth(period, 1, 0.9) for period in range(3)} == {
        sparse.depth(period, 0, 0.5) for period in range(3)
    }
    net, optimizer, technique = trained(8, freeze=0.7)
    moved = []
    for step in range(8, 20):
        technique.begin(step, (step + 1) / STEPS)
        before = dense(net)
        update(net, optimizer, step)
        changed = {name for name, value in dense(net).items() if not torch.equal(value, before[name])}
        moved.append([any(name.startswith(f"blocks.{nth}.") for name in changed) for nth in range(3)])
        assert "table.weight" in changed, "the output layer is trained in every period"
    assert moved == 4 * [[False, False, True]] + 4 * [[True, True, True]] + 4 * [[False, True, True]]


def test_compression_starts_anew_when_other_blocks_are_frozen(tmp_path: Path) -> None:
    net, _, technique = trained(2, share=1.0, freeze=0.7)
    assert [step for step in range(2, 15) if technique.begin(step, (step + 1) / STEPS)] == [4, 8, 12]
    assert all(each.requires_grad for each in net.parameters())
    told = {"method": "powersgd", "warmup_steps": 5}
    freezing = {"freeze": 0.5, "warmup": 0, "reselect_every": 3}  # other blocks while rows are still counted
    run = job(tmp_path, world_size=1, epochs=1, zero=0, sparse=freezing, communication=told)
    state = loop.train(replace(run, model=run.model.model_copy(update={"blocks": 2})))
    assert state.step > 9
    assert math.isfinite(state.curve[-1].loss)


def test_it_learns() -> None:
    net, optimizer, technique = trained(0, freeze=0.7)
    losses = []
    for step in range(120):
        technique.begin(step, (step + 1) / STEPS)
        losses.append(update(net, optimizer, step))
    assert losses[-1] < 0.3 * losses[1], losses


def test_what_sparse_training_does_not_go_with_is_named(tmp_path: Path) -> None:
    raw = {"train": {"zero": 1, "sparse": {"share": 0.5}}}
    with pytest.raises(ParamsError, match=r"params.yaml: train: .*share is 0.5.*zero: 0.*got 1.*set train.zero: 0"):
        config.parse(raw)
    raw = {"train": {"zero": 0, "precision": "bf16", "sparse": {"freeze": 0.5}}}
    with pytest.raises(ParamsError, match=r"sparse.freeze is 0.5.*precision: fp32 only \(got bf16\)"):
        config.parse(raw)
    config.parse({"train": {"zero": 0, "sparse": {"share": 0.5}}})


@pytest.mark.slow
def test_a_killed_sparse_run_ends_bit_for_bit_like_one_that_was_not(tmp_path: Path) -> None:
    technique = {"share": 0.3, "warmup": 0.1, "reselect_every": 4, "tables": True, "freeze": 0.5}
    whole = job(tmp_path / "whole", zero=0, sparse=technique, checkpoint_every_s=60.0)
    whole = replace(whole, model=whole.model.model_copy(update={"blocks": 2}))
    state = loop.train(whole)
    assert state.best.metric > 0.3, state.curve

    often = whole.train.model_copy(update={"checkpoint_every_s": 0.001})
    killed = replace(whole, train=often, checkpoints=tmp_path / "killed", out=tmp_path / "out")
    stage = multiprocessing.get_context("spawn").Process(target=loop.train, args=(killed,))
    stage.start()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        newest = max(killed.checkpoints.glob("step-*"), default=None)
        if newest is not None and newest.name >= "step-00000012":
            break
        time.sleep(0.01)
    os.kill(stage.pid or 0, signal.SIGKILL)
    stage.join()
    resumed = checkpoints.newest(killed.checkpoints)
    assert resumed is not None, "no checkpoint was written before the kill"
    assert not (killed.out / "model.json").exists()
    again = loop.train(replace(killed, train=whole.train))
    assert [(p.loss, p.metric) for p in again.curve] == [(p.loss, p.metric) for p in state.curve]
    assert weights(killed.out) == weights(whole.out)
