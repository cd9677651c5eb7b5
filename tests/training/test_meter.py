"""The figures of a run: operations against a known count, traffic against the parameters, time that adds up."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # its usual name

from slipway.training import flops, loop, watch
from slipway.training.meter import KEPT, Meter, Sample
from tests.training.test_loop import job, weights

CPU = torch.device("cpu")


def meter() -> tuple[Meter, list[Sample]]:
    told: list[Sample] = []
    return Meter("tokens", "fp32", CPU, told.append), told


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        heads = x_BTD.unsqueeze(1)  # one head: the fused kernel takes four dimensions
        mixed_BTD = F.scaled_dot_product_attention(heads, heads, heads).squeeze(1)
        return cast(torch.Tensor, self.down(self.dropout(self.up(mixed_BTD))).square().mean())


def train(model: Small, counter: flops.Counter | None, batch: int) -> list[torch.Tensor]:
    torch.manual_seed(7)
    x_BTD = torch.linspace(-1, 1, batch * 4 * 8).view(batch, 4, 8).requires_grad_()
    if counter is None:
        model(x_BTD).backward()
    else:
        with counter.counting({"x_BTD": np.zeros(x_BTD.shape)}):
            model(x_BTD).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return grads


def test_operations_are_counted_once_a_shape_and_equal_the_count_by_hand() -> None:
    model, counter = Small(), flops.Counter()
    linear = 3 * 2 * (3 * 4) * (8 * 32 + 32 * 8)  # forward, dX and dW of both, on 3 x 4 places
    forward = 2 * 2 * 3 * 4 * 4 * 8  # the logits and the mix of 3 samples
    attention = forward + 5 * forward // 2  # its backward pass computes the logits anew: five products
    for done in (1, 2, 3):
        train(model, counter, batch=3)
        assert counter.total == done * (linear + attention)
    train(model, counter, batch=6)
    assert counter.total == 5 * (linear + attention)


def test_counting_changes_no_gradient() -> None:
    torch.manual_seed(1)
    model = Small()
    plain = train(model, None, batch=3)
    counted = train(model, flops.Counter(), batch=3)
    assert len(plain) == 2
    assert all(torch.equal(a, b) for a, b in zip(plain, counted, strict=True))


@pytest.mark.parametrize("limit", [1, 16])
def test_a_batch_of_another_size_is_counted_and_one_of_nearly_the_same_is_known_by_it(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(flops, "SHAPES", limit)
    model, counter, looked, totals = Small(), flops.Counter(), [], [0.0]
    for batch in (30, 30, 31, 60, 61):
        train(model, counter, batch)
        looked.append(counter.looked)
        totals.append(counter.total)
    assert looked == [True, False, False, limit > 1, False]
    each = [after - before for before, after in itertools.pairwise(totals)]
    assert each == pytest.approx([size / 30 * each[0] for size in (30, 30, 31, 60, 61)])


def test_measuring_the_peak_is_short_and_leaves_the_generator_alone() -> None:
    state, began = torch.get_rng_state(), time.perf_counter()
    assert 1e8 < flops.peak("fp32", CPU) < 1e14
    assert time.perf_counter() - began < 10  # 0.2 on a quiet machine
    assert torch.equal(torch.get_rng_state(), state)


@dataclass(frozen=True)
class Clock:
    """What the first sample's steps took by a clock of the test's own (s), at least and at most."""

    waited: tuple[float, float]
    whole: tuple[float, float]


def two_samples() -> tuple[list[Sample], Clock]:
    """Two samples of two steps each, the first of them by another clock too."""
    told_by, told = meter()
    begun, inside, outside = time.perf_counter(), 0.0, 0.0
    before = told_by.totals()["seconds"]
    for loss in (1.0, 3.0):
        outer = time.perf_counter()
        with watch.part("data"):
            inner = time.perf_counter()
            time.sleep(0.03)  # short: after 0.25 s the meter would take a sample of its own
            inside += time.perf_counter() - inner
        outside += time.perf_counter() - outer
        watch.sent(1000)
        told_by.step(loss, units=64, norm=loss, rate=0.1)
    watch.gauge("workers", 3)
    least = time.perf_counter() - begun
    told_by.sample()
    most = time.perf_counter() - begun + before
    told_by.step(math.nan, units=64, norm=math.inf, rate=0.1, scale=1024.0, skipped=True)
    told_by.step(5.0, units=64, norm=2.0, rate=0.1, scale=1024.0)
    told_by.sample()
    return told, Clock((inside, outside), (least, most))


def test_a_sample_tells_of_the_steps_since_the_one_before() -> None:
    for _ in range(20):
        told, clock = two_samples()
        if len(told) == 2:  # else the machine was so slow that the meter took samples of its own
            break
    first, second = (sample.figures for sample in told)
    assert [sample.step for sample in told] == [2, 4]
    assert (first["loss"], first["grad_norm"], first["sent_bytes_per_step"]) == (2.0, 3.0, 1000)
    (least_waited, most_waited), (least, most) = clock.waited, clock.whole  # a stall of the machine shows in these too
    assert least_waited / most <= first["data_share"] * 1.0001  # figures have six digits
    assert first["data_share"] <= most_waited / least * 1.0001
    assert 128 / most <= first["tokens_per_s"] * 1.0001
    assert first["tokens_per_s"] <= 128 / least * 1.0001
    assert "loss_scale" not in first
    assert (second["loss"], second["skipped_steps"], second["loss_scale"], second["workers"]) == (5.0, 1, 1024, 3)
    assert second["data_share"] == 0
    assert "grad_norm" not in second, "an overflow's infinite norm is no figure"


def test_steps_that_counting_slows_are_left_out_of_the_utilisation() -> None:
    told_by, told = meter()
    model, slow_s = Small(), 1.0

    def step(batch: int, took_s: float) -> float:
        """Give the moment before the meter saw its end."""
        with told_by.counting({"x_BTD": np.zeros((batch, 4, 8))}):
            model(torch.ones(batch, 4, 8)).backward()
            time.sleep(took_s)
        now = time.perf_counter()
        told_by.step(1.0, units=batch, norm=1.0, rate=0.1)
        return now

    before_s = step(30, slow_s)  # counted: far longer than the others, and a sample of its own
    assert len(told) == 1
    assert "mfu" not in told[0].figures
    after_s, before = time.perf_counter(), told_by.totals()["flops"]
    for _ in range(3):
        step(30, 0.01)
    least = time.perf_counter() - after_s
    told_by.sample()
    most, done = time.perf_counter() - before_s, told_by.totals()["flops"] - before
    assert done == 3 * before, "a batch of a known shape counts as before"
    assert told_by.report()["flops_per_step"] == before, "counted steps are steps, too"
    slowest, fastest = done / told_by.peak / most, done / told_by.peak / least
    assert slowest - 6e-5 < told_by.report()["mfu"] < fastest + 6e-5, "their time is left out"


def test_a_peak_that_was_measured_while_others_had_the_machine_is_mended() -> None:
    told_by, _ = meter()
    told_by.peak /= 1000
    spoilt = told_by.peak
    told_by.step(1.0, units=1, norm=1.0, rate=0.1)
    told_by.sample()
    assert told_by.peak > 5 * spoilt


def test_a_long_run_keeps_a_bounded_history_with_its_end() -> None:
    told_by, told = meter()
    for step in range(5 * KEPT):
        told_by.step(float(step), units=1, norm=1.0, rate=0.1)
        told_by.sample()
    assert len(told) >= 5 * KEPT
    assert KEPT / 2 <= len(told_by.samples) <= KEPT
    assert told_by.samples[-1].step == 5 * KEPT
    assert all(sample in told for sample in told_by.samples)


def test_what_a_run_that_goes_on_tells_begins_where_it_stopped() -> None:
    one, _ = meter()
    one.step(1.0, units=10, norm=1.0, rate=0.1)
    one.sample()
    stopped = one.state_dict()
    time.sleep(0.2)
    two, told = meter()
    began = time.perf_counter()
    two.load_state_dict(stopped)
    two.step(2.0, units=10, norm=1.0, rate=0.1)
    two.sample()
    trained_s = time.perf_counter() - began
    assert [sample.step for sample in two.samples] == [1, 2]
    assert told[0].seconds <= stopped["totals"]["seconds"] + trained_s + 0.001, (
        "the pause between two runs is no training"
    )
    assert two.totals()["units"] == 20


@pytest.mark.slow
def test_a_run_tells_its_figures_and_leaves_a_trace(tmp_path: Path) -> None:
    mine = job(tmp_path, zero=0, checkpoint_every_s=60.0, profile=True)
    mine = replace(mine, trace=tmp_path / "train.trace.json.gz")
    state = loop.train(mine)
    found = state.figures
    parameters = sum(len(value) // 4 for value in weights(mine.out).values())
    # A ring of two sends (2 - 1) / 2 of the gradient, twice; beside it, the loss scale and norms: a few bytes.
    assert 4 * parameters <= found["sent_bytes_per_step"] < 4 * parameters + 200
    shares = found["time_share"]
    assert sum(shares.values()) == pytest.approx(1, abs=0.001)
    assert min(shares[name] for name in ("data", "forward", "backward", "optimizer", "communication")) > 0
    assert 0 < found["mfu"] < 1
    last = found["history"][-1]
    assert last["step"] == state.curve[-1].step
    assert {"loss", "sequences_per_s", "mfu", "grad_norm", "rss_bytes", "data_share"} <= set(last)
    events = json.loads(gzip.decompress(mine.trace.read_bytes() if mine.trace else b""))["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    assert names.count("forward") == 5
    assert {"backward", "optimizer", "aten::mm"} <= set(names)


@pytest.mark.slow
def test_training_ends_early_and_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    turned = {"epochs": 60, "patience": 2, "learning_rate": 0.02, "checkpoint_every_s": 60.0, "zero": 0}
    one, two = job(tmp_path / "one", **turned), job(tmp_path / "two", **turned)
    first, second = loop.train(one), loop.train(two)
    assert len(first.curve) < 60
    assert first.curve[-1].epoch == first.best.epoch + 2
    assert [(p.loss, p.metric) for p in first.curve] == [(p.loss, p.metric) for p in second.curve]
    assert weights(one.out) == weights(two.out)
