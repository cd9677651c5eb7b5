"""The llm in the training loop: windows without overlap, every ZeRO stage learns, an expert may go unused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from slipway.errors import DataError, ModelError
from slipway.params import TrainParams
from slipway.training import loop
from slipway.workloads.llm import corpus
from slipway.workloads.llm.model import make
from slipway.workloads.llm.params import LlmParams
from slipway.workloads.llm.training import LlmTask
from tests.llm import data

TINY = LlmParams(
    layers=2,
    dense_layers=1,
    width=32,
    dense_width=48,
    heads=2,
    head_width=8,
    q_lora_rank=16,
    kv_lora_rank=8,
    experts=4,
    experts_per_token=2,
    expert_width=16,
    context_length=16,
    epoch_tokens=0,
)


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> corpus.Corpus:
    place = tmp_path_factory.mktemp("corpus")
    return data.read(data.params(data.folder(place / "texts")), place / "out")


def job(folder: Path, data_folder: Path, model: LlmParams = TINY, **turned: object) -> loop.Job:
    train = {"epochs": 3, "batch_size": 8, "learning_rate": 0.01, "world_size": 2, "checkpoint_every_s": 60.0, **turned}
    return loop.Job(
        "llm", data_folder, TrainParams.model_validate(train), model, folder / "checkpoints", folder / "out"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "precision"), [(1, "bf16"), (3, "fp32")])
def test_perplexity_falls_though_experts_go_unused(
    tmp_path: Path, ingested: corpus.Corpus, zero: int, precision: str
) -> None:
    # 8 rows of 2 tokens and 64 experts: in every step some expert has no token on one rank, or on both.
    model = TINY.model_copy(update={"experts": 64, "experts_per_token": 1, "context_length": 2, "epoch_tokens": 1024})
    state = loop.train(job(tmp_path, ingested.folder, model, zero=zero, precision=precision))
    perplexities = [point.figures["perplexity"] for point in state.curve]
    assert perplexities[-1] < 0.5 * ingested.vocabulary, perplexities
    assert perplexities[-1] < perplexities[0]
    assert state.best.metric == pytest.approx(-math.log(min(perplexities)))


def test_windows_cover_the_tokens_once_and_are_the_same_each_time(ingested: corpus.Corpus) -> None:
    train = TrainParams(batch_size=8, world_size=2)
    task = LlmTask(ingested.folder, train, TINY)
    mine, again = task.epoch(3, 2), LlmTask(ingested.folder, train, TINY).epoch(3, 2)
    begins = np.sort(np.concatenate(mine.batches))
    assert (np.diff(begins) == TINY.context_length).all()
    tokens = ingested.parts["train"].tokens
    assert begins[0] < TINY.context_length
    assert begins[-1] + 2 * TINY.context_length >= len(tokens) - 1
    for one, two in zip(mine, again, strict=True):
        assert (one["token_BT"] == two["token_BT"]).all()
    first = mine.batches[0][0]
    assert (mine[0]["token_BT"][0] == tokens[first : first + TINY.context_length + 1]).all()
    assert task.count(mine[0]) == 8 * TINY.context_length


def test_an_epoch_of_few_tokens_draws_others_the_next_time(ingested: corpus.Corpus) -> None:
    few = TINY.model_copy(update={"epoch_tokens": 512})
    task = LlmTask(ingested.folder, TrainParams(batch_size=8, world_size=2), few)
    assert [sum(task.count(batch) for batch in task.epoch(epoch, 2)) for epoch in (0, 1)] == [512, 512]
    assert not set(task.epoch(0, 2).batches[0]) & set(task.epoch(1, 2).batches[0])


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_the_validation_metric_is_the_same_at_any_number_of_ranks(ingested: corpus.Corpus, ranks: int) -> None:
    torch.manual_seed(0)
    model = make(TINY, ingested.vocabulary, ingested.meta["end"])
    model.train(False)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        parts = []
        for rank in range(ranks):
            task = LlmTask(ingested.folder, TrainParams(batch_size=8, world_size=ranks), TINY)
            before = len(calls)
            parts.append((*task.validate(model, rank), len(calls) - before))
        alone = LlmTask(ingested.folder, TrainParams(batch_size=64, world_size=1), TINY).validate(model, 0)
    assert sum(part[0] for part in parts) == pytest.approx(alone[0], rel=1e-5)
    assert sum(part[1] for part in parts) == alone[1]
    assert len({part[2] for part in parts}) == 1, "a partitioned model would wait for ever"
    assert alone[0] / alone[1] == pytest.approx(-math.log(ingested.vocabulary), rel=0.02)  # it has learnt nothing


def test_too_few_tokens_are_refused(ingested: corpus.Corpus) -> None:
    with pytest.raises(DataError, match=r"part validation holds .* too few"):
        LlmTask(ingested.folder, TrainParams(world_size=1), TINY.model_copy(update={"context_length": 4096}))


def test_weights_that_are_not_there_are_refused(ingested: corpus.Corpus, tmp_path: Path) -> None:
    for folder, message in (("nowhere", "no such folder"), (".", "not a folder in the Hugging Face layout")):
        params = TINY.model_copy(update={"weights": str(tmp_path / folder)})
        with pytest.raises(ModelError, match=message):
            LlmTask(ingested.folder, TrainParams(world_size=1), params).model()
