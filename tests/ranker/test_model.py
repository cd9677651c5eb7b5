"""Laws of the ranker and its exports, and its metrics against naive references."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipway.compression import engine
from slipway.errors import DataError
from slipway.params import TrainParams
from slipway.workloads.ranker import metrics, scoring
from slipway.workloads.ranker.graph import OUTPUT, RankerGraph
from slipway.workloads.ranker.loss import cross_entropy
from slipway.workloads.ranker.model import Dropout, Ranker
from slipway.workloads.ranker.params import RankerParams
from slipway.workloads.ranker.training import RankerTask
from slipway.workloads.ranker.windows import windows
from tests.ranker import data

ITEMS = 40
PARAMS = RankerParams(width=16, blocks=2, heads=2, max_length=12)
histories = st.lists(st.integers(1, ITEMS), min_size=1, max_size=9)


def _model() -> Ranker:
    torch.manual_seed(3)
    model = Ranker(ITEMS, PARAMS).eval()
    with torch.no_grad():
        model.item.weight[1:].normal_()
        model.place.weight.normal_(std=0.3)
    return model


MODEL = _model()
WEIGHTS = {name: value.detach().numpy() for name, value in MODEL.state_dict().items()}
FP32 = engine.load(RankerGraph(WEIGHTS, PARAMS).build(), "fp32")


def answer(rows: list[list[int]], length: int | None = None) -> list[np.ndarray]:
    longest = length or max(map(len, rows))
    history = np.array([[0] * (longest - len(row)) + row for row in rows], dtype=np.int64)
    return list(FP32(["items", "scores", "logits"], {"history": history}))


@given(history=histories, padding=st.integers(0, 3))
def test_padding_on_the_left_changes_nothing(history: list[int], padding: int) -> None:
    bare, padded = answer([history]), answer([history], len(history) + padding)
    np.testing.assert_allclose(bare[2], padded[2], atol=1e-4)


@given(batch=st.lists(histories, min_size=1, max_size=5))
def test_a_batched_answer_is_the_single_answer(batch: list[list[int]]) -> None:
    together = answer(batch)[2]
    for row, history in zip(together, batch, strict=True):
        np.testing.assert_allclose(row, answer([history])[2][0], atol=1e-4)


@given(history=histories)
def test_the_export_gives_the_model_s_logits_and_shows_the_best_unseen_items(history: list[int]) -> None:
    items, scores, logits = (value[0] for value in answer([history]))
    with torch.no_grad():
        expected = MODEL.logits(torch.tensor([history]))[0].numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    free = [item for item in range(1, ITEMS + 1) if item not in history]
    assert set(items[: len(free)].tolist()) == set(free)
    assert np.isneginf(scores[len(free) :]).all()
    assert (np.diff(scores[: len(free)]) <= 0).all()


@pytest.mark.parametrize("blocks", [1, 2])
def test_one_head_whose_matrices_are_joined_answers_as_the_model(blocks: int) -> None:
    torch.manual_seed(4)
    shape = RankerParams(width=16, blocks=blocks, heads=1, max_length=12)
    model = Ranker(ITEMS, shape).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.4)
        history = torch.tensor([[0, 0, 3, 9, 1], [4, 4, 7, 2, 5]])
        expected = model.logits(history).numpy()
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    found = engine.load(RankerGraph(weights, shape).build(), "one")(["logits"], {"history": history.numpy()})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_best_of_many_items_are_shown_best_first() -> None:
    items = 12_863
    torch.manual_seed(0)
    shape = RankerParams(width=8, blocks=1, max_length=5)
    weights = {name: value.detach().numpy() for name, value in Ranker(items, shape).state_dict().items()}
    run = engine.load(RankerGraph(weights, shape).build(), "many")
    history = np.random.default_rng(0).integers(1, items + 1, size=(6, 5))
    shown, scores, logits = run(["items", "scores", "logits"], {"history": history})
    np.put_along_axis(logits, np.pad(history, ((0, 0), (1, 0))), -np.inf, axis=1)
    np.testing.assert_array_equal(scores, -np.sort(-logits, axis=1)[:, :100])
    np.testing.assert_array_equal(np.take_along_axis(logits, shown, 1), scores)
    assert all(len(set(row)) == 100 for row in shown.tolist())


def test_int8_ranks_nearly_as_fp32_does() -> None:
    probe = RankerGraph(WEIGHTS, PARAMS)
    run = engine.load(probe.build(probe=True), "probe")
    history = np.random.default_rng(0).integers(1, ITEMS + 1, size=(64, 9))
    ranges = engine.ranges(run, [name.removeprefix("range.") for name in probe.graph.probes], [{"history": history}])
    whole, output = RankerGraph(WEIGHTS, PARAMS, ranges), RankerGraph(WEIGHTS, PARAMS, {OUTPUT: ranges[OUTPUT]})
    expected = FP32(["logits"], {"history": history})[0]
    for graph, least in ((whole, 0.98), (output, 0.995)):
        logits = engine.load(graph.build(), "int8")(["logits"], {"history": history})[0]
        assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > least


def test_the_loss_is_the_cross_entropy_when_all_items_are_compared() -> None:
    history, target = torch.tensor([[0, 3, 5]]), torch.tensor([[0, 5, 9]])
    with torch.no_grad():
        loss = MODEL(history, target, torch.arange(1, ITEMS + 1), torch.zeros(ITEMS))
        logits = MODEL.encode(history)[0] @ MODEL.item.weight.T
        expected = torch.nn.functional.cross_entropy(logits[1:, 1:], target[0, 1:] - 1)
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("count", [3, 700])
def test_the_loss_and_its_gradients_are_autograd_s(count: int) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(rows, 16, requires_grad=True) for rows in (count, 1000)]
    bias_N, answer_P = torch.rand(1000), torch.randint(0, 1000, (count,))
    logits_PN = tensors[0] @ tensors[1].T + bias_N.masked_fill(answer_P[:, None] == torch.arange(1000), 0)
    expected = torch.nn.functional.cross_entropy(logits_PN, answer_P)
    found = cross_entropy(tensors[0], tensors[1], bias_N, answer_P)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(3 * loss, tensors) for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_the_sampled_sum_is_in_the_mean_that_over_all_items(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    users = (rng.random((300, 12)) ** 3 * ITEMS + 1).astype(int).tolist()  # low ids are popular
    folder = data.write(tmp_path, users, items=ITEMS)
    task = RankerTask(folder, TrainParams(batch_size=3, world_size=1), PARAMS.model_copy(update={"negatives": 4}))
    assert task.popularity == pytest.approx(np.bincount([i for u in users for i in u[1:-2]], minlength=41) / 2700)
    value = rng.random(ITEMS + 1)
    batches = [batch for epoch in range(20) for batch in task.epoch(epoch, 1)]
    sums = [float((value[batch["item_N"]] * np.exp(batch["bias_N"])).sum()) for batch in batches]
    assert np.mean(sums) == pytest.approx(value[1:].sum(), rel=0.03)
    assert max(len(batch["item_N"]) for batch in batches) < ITEMS
    assert all(np.isin(batch["target_BT"][batch["target_BT"] > 0], batch["item_N"]).all() for batch in batches)


def test_dropout_drops_its_share_keeps_the_mean_and_leaves_an_answer_alone() -> None:
    torch.manual_seed(0)
    dropout, x = Dropout(0.3), torch.ones(501, 401, requires_grad=True)
    dropped = dropout(x)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.3, abs=0.005)
    assert float(dropped.detach().mean()) == pytest.approx(1, abs=0.01)
    assert torch.equal(torch.autograd.grad(dropped.sum(), x)[0], dropped)
    assert not torch.equal(dropout(x), dropped)
    assert dropout.eval()(x) is x


def test_windows_make_every_training_item_a_target_once() -> None:
    offsets = np.cumsum([0, 3, 4, 12, 2, 30])
    begin, end = windows(offsets, 5)
    targets = sorted(at for b, e in zip(begin, end, strict=True) for at in range(b + 1, e))
    expected = [at for b, e in itertools.pairwise(offsets) for at in range(b + 1, e - 2)]
    assert targets == expected
    assert (end - begin).max() == 6


def test_an_epoch_holds_every_window_once_and_is_the_same_each_time(tmp_path: Path) -> None:
    folder = data.write(tmp_path, data.steps(users=50, items=20))
    train = TrainParams(batch_size=4, world_size=2)
    one, again = RankerTask(folder, train, PARAMS).epoch(3, 2), RankerTask(folder, train, PARAMS).epoch(3, 2)
    assert len(one) == math.ceil(50 / 4)
    assert sorted(np.concatenate([one.order[i][0] for i in range(len(one))])) == one.data.offsets[:-1].tolist()
    for mine, same in zip(one, again, strict=True):
        assert all((mine[name] == same[name]).all() for name in mine)
    longest = [max(len(one[at]["history_BT"][0]), len(one[at + 1]["history_BT"][0])) for at in range(0, 12, 2)]
    shortest = [min(len(one[at]["history_BT"][0]), len(one[at + 1]["history_BT"][0])) for at in range(0, 12, 2)]
    assert np.subtract(longest, shortest).max() <= 2, "the micro-batches of a step are of unlike length"


def test_too_few_users_for_the_processes_are_refused(tmp_path: Path) -> None:
    folder = data.write(tmp_path, [[1, 2, 3, 4]])
    with pytest.raises(DataError, match="1 training sequences for 2 processes"):
        RankerTask(folder, TrainParams(world_size=2), PARAMS)


def test_the_full_metric_is_that_of_a_naive_ranking(tmp_path: Path) -> None:
    users = data.steps(users=30, items=ITEMS, seed=1, shortest=4, longest=10)
    folder = data.write(tmp_path, users, items=ITEMS)
    (folder / "items.json").write_text(
        '{"max_length": 12, "keys": [' + ", ".join(f'"item{i}"' for i in range(1, ITEMS + 1)) + "]}"
    )
    samples = scoring.samples(folder, "test", 0, 0)
    found = scoring.score(FP32, samples, folder)
    for at, events in enumerate(users):
        *history, truth = events
        with torch.no_grad():
            logits = MODEL.logits(torch.tensor([history]))[0]
        free = [item for item in range(1, ITEMS + 1) if item not in history]
        ahead = sum(float(logits[item]) > float(logits[truth]) for item in free)
        assert found["hr_at_10"][at] == (ahead < 10)
        assert found["ndcg_at_10"][at] == pytest.approx(1 / math.log2(ahead + 2) if ahead < 10 else 0)


def test_the_sampled_metric_counts_ties_against_the_model() -> None:
    logits = np.array([[0.0, 5.0, 3.0, 3.0, 1.0]])
    ranks = metrics.sampled_ranks(logits, np.array([2]), np.array([[1, 3, 4, 0]]))
    assert ranks.tolist() == [2]  # behind item 1, level with item 3; id 0 is no negative
    assert metrics.gains(ranks).tolist() == pytest.approx([0.5])
    assert metrics.gains(np.array([0, 9, 10])).tolist() == pytest.approx([1, 1 / math.log2(11), 0])


def test_negatives_are_items_that_the_user_has_not_seen() -> None:
    seen = np.array([[0, 1, 2], [3, 4, 5]])
    negatives = metrics.draw_negatives(np.random.default_rng(0), seen, 6)
    assert not set(negatives[0].tolist()) & {1, 2}
    assert set(negatives[1].tolist()) == {1, 2, 6}
    everything = metrics.draw_negatives(np.random.default_rng(0), np.array([[1, 2]]), 2)
    assert (everything == 0).all()
